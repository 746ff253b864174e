"""What caches without a plan would do, against caches that are played token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.caching import computed_by_blocks, computed_in_given_order
from pipeline.plan.plan import Plan, build_plan
from pipeline.records import SamplingParams
from tests.plan.trie_oracle import Drawn, Rows, drawn_rows


def make_plan(drawn: Drawn) -> Plan:
    names = [str(row) for row in range(len(drawn.rows))]
    nothing, tenants = np.zeros(len(names), np.int64), np.array(drawn.tenants, np.int64)
    return build_plan(drawn.table, names, (SamplingParams(),), nothing, tenants)


@given(drawn_rows(), st.integers(1, 5))
def test_blocks_are_computed_once_and_the_rest_of_a_row_each_time(drawn: Drawn, block: int) -> None:
    """Seen red: blocks counted by edge length, tails counted once per prompt."""
    cached, computed = set(), 0
    for tenant, ids in zip(drawn.tenants, drawn.rows, strict=True):
        for end in range(block, len(ids) + 1, block):
            computed += block * ((tenant, ids[:end]) not in cached)
            cached.add((tenant, ids[:end]))
        computed += len(ids) % block
    assert computed_by_blocks(make_plan(drawn), block) == computed


@given(drawn_rows())
def test_blocks_of_one_token_save_what_the_plan_saves(drawn: Drawn) -> None:
    plan = make_plan(drawn)
    assert computed_by_blocks(plan, 1) == plan.tree.unique_tokens


@given(drawn_rows())
def test_a_cache_that_holds_all_computes_each_token_once(drawn: Drawn) -> None:
    plan = make_plan(drawn)
    total = sum(map(len, drawn.rows))
    assert computed_in_given_order(plan, 10**9) == (plan.tree.unique_tokens, total)
    assert computed_in_given_order(plan, 0) == (total, total)


def test_a_small_cache_forgets_what_was_not_used_for_longest() -> None:
    """A row of another group between two of one costs the group's prefix again."""
    first, other = (1, 1, 1, 1), (2, 2, 2, 2)
    rows: Rows = [(*first, 5), (*other, 5), (*first, 6), (*first, 7)]
    plan = make_plan(Drawn(rows, [0] * 4))
    assert computed_in_given_order(plan, 20) == (5 + 5 + 1 + 1, 20)
    assert computed_in_given_order(plan, 5) == (5 + 5 + 5 + 1, 20)
