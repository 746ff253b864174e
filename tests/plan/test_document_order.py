"""The order of documents in a row, and of rows on a device, against slow ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.document_order import best_order, run_order
from pipeline.plan.document_planning import plan_documents
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.peak import KVNeeds
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.row_order import order_rows
from pipeline.records import SamplingParams
from tests.plan.test_documents import Row, reuses, rows_of, table_of

few = st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=7)


def slow_order(
    documents: list[list[int]], tokens: list[int], rows: list[int]
) -> dict[int, list[int]]:
    """As section 1 says it: the document with most (uses - 1) x tokens first, then rows with it and
    without it apart."""
    uses = {d: sum(d in documents[row] for row in rows) for d in range(len(tokens))}
    best = min(uses, key=lambda d: ((1 - uses[d]) * tokens[d], d))
    if uses[best] < 2:
        return {row: documents[row] for row in rows}
    having = [row for row in rows if best in documents[row]]
    left = list(map(list, documents))
    for row in having:
        left[row].remove(best)
    found = slow_order(left, tokens, having)
    others = slow_order(documents, tokens, [row for row in rows if row not in having])
    return {row: [best, *found[row]] for row in having} | others


@given(few, st.lists(st.integers(1, 3), min_size=5, max_size=5), st.integers(1, 2))
def test_the_best_order_is_that_of_the_rule(
    documents: list[list[int]], tokens: list[int], groups: int
) -> None:
    group = [row % groups for row in range(len(documents))]
    found = best_order(documents, tokens, group)
    for number in range(groups):
        rows = [row for row in range(len(documents)) if group[row] == number]
        assert {row: found[row] for row in rows} == slow_order(documents, tokens, rows)
    assert list(map(sorted, found)) == list(map(sorted, documents))


def test_the_best_order_shares_what_other_orders_cannot() -> None:
    """Two questions of the same three documents share all of them, a third shares the longest."""
    assert best_order([[0, 1, 2], [2, 0, 1], [3, 2]], [1, 2, 9, 4], [0, 0, 0]) == [
        [2, 1, 0], [2, 1, 0], [2, 3],
    ]  # fmt: skip


@given(rows_of, reuses)
def test_every_sequence_runs_once(rows: list[Row], reuse: Reuse) -> None:
    """Part of the sequences in the order of all."""
    table, segments = table_of(rows)
    plan = plan_documents(table, np.arange(len(rows)), segments, reuse)
    order = run_order(plan, np.arange(len(rows))).tolist()
    assert sorted(order) == list(range(len(rows)))
    some = list(range(0, len(rows), 2))
    assert run_order(plan, np.array(some)).tolist() == [s for s in order if s in some]


def encodings(order: Sequence[int], rows: list[list[int]], room: int) -> int:
    """How often a document is encoded where the last `room` ones are there."""
    there: dict[int, None] = {}
    count = 0
    for row in order:
        for document in rows[row]:
            count += document not in there
            there.pop(document, None)
            there[document] = None
        for document in list(there)[: len(there) - room]:
            del there[document]
    return count


def order_of(rows: list[list[int]]) -> list[int]:
    bounds, used = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
    return order_rows(bounds, used, np.full(used.max() + 1, 7)).tolist()


def test_rows_that_share_documents_run_one_after_the_other() -> None:
    """Documents of twenty subjects, whose questions come in any order: each is encoded once."""
    draw = random.Random(5)
    rows = [draw.sample(range(20 * s, 20 * s + 20), 4) for s in range(20) for _ in range(30)]
    draw.shuffle(rows)
    assert encodings(order_of(rows), rows, 40) == len({d for row in rows for d in row})
    assert encodings(range(len(rows)), rows, 40) > 4 * 400


@pytest.mark.parametrize(("room", "share"), [(64, 0.8), (256, 0.8), (1024, 0.75)])
def test_documents_that_give_way_are_encoded_again_less_often(room: int, share: float) -> None:
    """Some documents are asked for by many rows, as search engines do it. 0.9 of the order of the
    file was reached by the most used document first."""
    draw = np.random.default_rng(1)
    weight = 1 / np.arange(1, 2001) ** 0.8
    rows = [draw.choice(2000, 5, False, weight / weight.sum()).tolist() for _ in range(3000)]
    assert encodings(order_of(rows), rows, room) < share * encodings(range(3000), rows, room)


@given(rows_of, reuses, st.integers(1, 4))
def test_peak_kv_is_that_of_the_fullest_window_of_rows(
    rows: list[Row], reuse: Reuse, max_rows: int
) -> None:
    plan = planned(rows, reuse)
    documents = plan.documents
    assert documents is not None
    order = run_order(documents, np.arange(len(plan.sequences))).tolist()
    users, bounds = documents.users(np.arange(len(order)))
    places = [
        [order.index(s) for s in users[low:high].tolist()]
        for low, high in itertools.pairwise(bounds.tolist())
    ]
    width, worst = min(max_rows, len(order)), 0
    for first in range(len(order) - width + 1):
        window = range(first, first + width)
        held = sum(
            int(edge) for edge, at in zip(documents.tree.edge_lengths, places, strict=True)
            if at and min(at) < first + width and max(at) >= first
        )  # fmt: skip
        own = sum(int(documents.own.lengths[order[at]]) + 5 for at in window)
        worst = max(worst, held + own)
    assert KVNeeds.of(plan).peak(max_rows) == worst


def planned(rows: list[Row], reuse: Reuse) -> Plan:
    table, segments = table_of(rows)
    ids, params = [str(row) for row in range(len(rows))], (SamplingParams(5),)
    plan = build_plan(
        table, ids, params, np.zeros(len(rows), np.int64), kind_of_row=segments.kinds()
    )
    return with_documents(plan, segments, reuse, np.zeros(len(rows), np.int64))
