"""The tree against a dictionary of all prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from pipeline.plan import radix_tree
from pipeline.plan.radix_tree import RadixTree, build_tree, sort_prompts
from pipeline.plan.token_table import TokenTable
from tests.plan.trie_oracle import Drawn, drawn_rows


def make_tree(drawn: Drawn) -> tuple[RadixTree, TokenTable]:
    table = drawn.table
    tenant = np.array(drawn.tenants, np.int64)
    order, prompt = sort_prompts(table, tenant)
    first = np.flatnonzero(np.diff(prompt, prepend=-1))
    return build_tree(table, tenant, order[first]), table


@given(drawn_rows())
def test_unique_tokens_are_the_distinct_prefixes(drawn: Drawn) -> None:
    tree, _ = make_tree(drawn)
    assert tree.unique_tokens == len(drawn.rows_by_prefix())


@given(drawn_rows())
def test_a_path_covers_its_prompt_without_gap_from_root_to_leaf(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    for prompt, row in enumerate(tree.row_of_prompt.tolist()):
        path = tree.path(int(tree.terminal[prompt]))
        starts, ends = tree.start[path].tolist(), tree.end[path].tolist()
        assert starts == [0, *ends[:-1]]
        assert ends[-1] == len(table[row])
        assert all(tree.prompt_lo[n] <= prompt < tree.prompt_hi[n] for n in path)


@given(drawn_rows())
def test_all_prompts_below_a_node_share_its_prefix_and_no_other_prompt_does(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    shared = drawn.rows_by_prefix()
    for node in range(tree.num_nodes):
        end = int(tree.end[node])
        below = tree.row_of_prompt[tree.prompt_lo[node] : tree.prompt_hi[node]].tolist()
        tenant = drawn.tenants[below[0]]
        prefix = drawn.rows[below[0]][:end]
        with_prefix = {(drawn.tenants[r], drawn.rows[r]) for r in shared[tenant, prefix]}
        assert {(drawn.tenants[r], drawn.rows[r]) for r in below} == with_prefix


@given(drawn_rows())
def test_parents_come_first_and_edges_are_never_empty(drawn: Drawn) -> None:
    tree, _ = make_tree(drawn)
    assert (tree.parent < np.arange(tree.num_nodes)).all()
    assert (tree.edge_lengths > 0).all()


@given(drawn_rows())
def test_siblings_begin_with_different_tokens(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    seen = set()
    for node in range(tree.num_nodes):
        row = int(tree.row_of_prompt[tree.prompt_lo[node]])
        key = (drawn.tenants[row], int(tree.parent[node]), int(table[row][tree.start[node]]))
        assert key not in seen
        seen.add(key)


@given(drawn_rows())
def test_prompts_are_distinct_and_sorted_by_tenant_and_ids(drawn: Drawn) -> None:
    table = drawn.table
    order, prompt = sort_prompts(table, np.array(drawn.tenants, np.int64))
    keys = [(drawn.tenants[row], drawn.rows[row]) for row in order.tolist()]
    assert keys == sorted(keys)
    assert len(keys) == sum(1 for row in drawn.rows if row)
    by_prompt = dict(zip(prompt.tolist(), keys, strict=True))
    assert len(set(by_prompt.values())) == len(by_prompt) == len(set(keys))


@given(drawn_rows())
def test_comparing_in_small_pieces_changes_nothing(drawn: Drawn) -> None:
    whole, _ = make_tree(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radix_tree, "_COMPARE_TOKENS", 3)
        pieces, _ = make_tree(drawn)
    for name in ("parent", "start", "end", "prompt_lo", "prompt_hi", "terminal"):
        assert getattr(whole, name).tolist() == getattr(pieces, name).tolist()


def test_the_picture_of_the_module() -> None:
    rows = [(0, 1), (0, 1, 2), (0, 1, 3, 4), (9,)]
    tree, _ = make_tree(Drawn(rows, [0] * 4))
    assert tree.parent.tolist() == [-1, 0, 0, -1]
    assert list(zip(tree.start.tolist(), tree.end.tolist(), strict=True)) == [
        (0, 2), (2, 3), (2, 4), (0, 1)
    ]  # fmt: skip
    assert tree.terminal.tolist() == [0, 1, 2, 3]


def test_a_table_without_tokens_has_an_empty_tree() -> None:
    tree, _ = make_tree(Drawn([(), ()], [0, 0]))
    assert (tree.num_nodes, tree.num_prompts, tree.unique_tokens) == (0, 0, 0)
