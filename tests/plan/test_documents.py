"""What is encoded once, what rows see of it, and what is their own, against a slow count."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import document_planning, token_table
from pipeline.plan.document_planning import plan_documents
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse, arrange
from pipeline.plan.plan import build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

VOCABULARY = 50
Row = tuple[list[int], list[list[int]], list[int]]

short = st.lists(st.integers(0, 2), min_size=1, max_size=5)
rows_of = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=3), st.lists(short, max_size=4), short),
    min_size=1,
    max_size=6,
)
reuses = st.builds(
    Reuse,
    st.sampled_from(["concat", "epic", "kvlink", "packet"]),
    st.just(VOCABULARY),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2),
)


def table_of(rows: list[Row]) -> tuple[TokenTable, Segments]:
    parts = [[preamble, *documents, question] for preamble, documents, question in rows]
    table = TokenTable.from_lists([[i for part in row for i in part] for row in parts], VOCABULARY)
    bounds = np.cumsum([0, *(len(row) for row in parts)])
    return table, Segments(bounds, np.array([len(part) for row in parts for part in row]))


@given(rows_of, reuses)
def test_every_token_of_a_row_is_seen_or_computed_exactly_once(
    rows: list[Row], reuse: Reuse
) -> None:
    for preamble, documents, question in rows:
        parts = [np.array(part, np.int64) for part in (preamble, *documents, question)]
        arranged = arrange(parts, reuse)
        at = {position: int(i) for position, i in enumerate(arranged.preamble)}
        for use in arranged.uses:
            for position in range(use.first, len(use.path)):
                assert at.setdefault(position + use.shift, int(use.path[position])) >= 0
        seen = len(arranged.preamble) + sum(len(u.path) - u.first for u in arranged.uses)
        for run in arranged.runs:
            at |= {run.position + i: int(token) for i, token in enumerate(run.token_ids)}
            seen += len(run.token_ids)
        assert sorted(at) == list(range(seen))
        plain = [at[position] for position in range(seen) if at[position] < VOCABULARY]
        assert plain == [*preamble, *(i for d in documents for i in d), *question]
        assert seen - len(plain) == {
            "kvlink": reuse.soft_tokens * len(documents),
            "packet": 2 * reuse.soft_tokens * len(documents),
        }.get(reuse.mode, 0)


@given(rows_of, reuses, st.randoms(use_true_random=False))
def test_the_count_to_compute_is_that_of_distinct_beginnings_and_own_tokens(
    rows: list[Row], reuse: Reuse, draw: random.Random
) -> None:
    """A document of a tenant is not another's, one that a row has twice is encoded once."""
    table, segments = table_of(rows)
    tenant = np.array([draw.randint(0, 1) for _ in rows])
    every = np.arange(len(rows))
    plan = plan_documents(table, every, segments, reuse, tenant)
    chosen = np.flatnonzero([draw.random() < 0.7 for _ in rows])
    for sequences in (every, chosen):
        encoded, own = set(), 0
        for row in sequences.tolist():
            preamble, documents, question = rows[row]
            parts = [np.array(part, np.int64) for part in (preamble, *documents, question)]
            arranged = arrange(parts, reuse)
            own += sum(len(run.token_ids) for run in arranged.runs)
            for path in (arranged.preamble, *(use.path for use in arranged.uses)):
                ids = path.tolist()
                encoded |= {(tenant[row], *ids[: end + 1]) for end in range(len(ids))}
        assert plan.tokens_to_compute(sequences) == len(encoded) + own
        part = plan.only(sequences)
        assert part.tokens_to_compute(np.arange(len(sequences))) == len(encoded) + own
        assert np.array_equal(part.prompt_ends, plan.prompt_ends[sequences])


@given(rows_of, reuses, st.randoms(use_true_random=False))
def test_all_rows_together_are_planned_as_each_is_arranged(
    rows: list[Row], reuse: Reuse, draw: random.Random
) -> None:
    table, segments = table_of(rows)
    tenant = np.array([draw.randint(0, 1) for _ in rows])
    chosen = np.array(draw.sample(range(len(rows)), draw.randint(1, len(rows))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_table, "CHUNK_BYTES", 16)  # a row or two at a time
        patch.setattr(document_planning, "_SEQUENCES_AT_A_TIME", 2)
        plan = plan_documents(table, chosen, segments, reuse, tenant)
    owner: dict[int, int] = {}
    for sequence, row in enumerate(chosen.tolist()):
        arranged = arrange(np.split(table[row].astype(np.int64), cuts(segments, row)), reuse)
        preamble = int(plan.preamble[sequence])
        assert (preamble >= 0) == (len(arranged.preamble) > 0)
        paths = [(preamble, arranged.preamble)] if preamble >= 0 else []
        low, high = plan.use_bounds[sequence : sequence + 2]
        found = zip(
            plan.use_path[low:high], plan.use_first[low:high], plan.use_shift[low:high], strict=True
        )
        for (path, first, shift), use in zip(found, arranged.uses, strict=True):
            assert (first, shift) == (use.first, use.shift)
            paths.append((int(path), use.path))
        for path, ids in paths:
            assert plan.paths[path].tolist() == ids.tolist()
            assert plan.tree.end[plan.terminal[path]] == len(ids)
            assert owner.setdefault(path, tenant[row]) == tenant[row]
        low, high = plan.run_bounds[sequence : sequence + 2]
        assert plan.run_position[low:high].tolist() == [run.position for run in arranged.runs]
        own = np.split(plan.own[sequence], np.cumsum(plan.run_length[low:high])[:-1])
        assert [ids.tolist() for ids in own] == [r.token_ids.tolist() for r in arranged.runs]


def cuts(segments: Segments, row: int) -> list[int]:
    return np.cumsum(segments.of(row))[:-1].tolist()


def test_the_same_ids_cut_in_two_ways_are_two_sequences_only_where_documents_move() -> None:
    rows: list[Row] = [
        ([1], [[2, 3], [4]], [5]),
        ([1], [[2], [3, 4]], [5]),
        ([1], [[2, 3], [4]], [5]),
    ]
    table, segments = table_of(rows)
    args = table, ["a", "b", "c"], (SamplingParams(),), np.zeros(3, np.int64)
    plan = with_documents(
        build_plan(*args, kind_of_row=segments.kinds()),
        segments,
        Reuse("concat", VOCABULARY),
        np.zeros(3, np.int64),
    )
    first, other, copy = plan.sequence_of_row.tolist()
    assert first == copy != other and len(plan.sequences) == 2
    assert plan.reuse_depth.tolist() == [5, 1 + 1, 5]  # a copy; the preamble and what begins with 2
    assert len(build_plan(*args).sequences) == 1


def test_depth_and_group_of_a_row_are_those_of_its_documents() -> None:
    x, y, z = [10, 11, 12], [20, 21], [30]
    rows: list[Row] = [
        ([1], [x, y], [7]), ([1], [y, x], [8]), ([1], [z, x], [9]), ([2], [x], [7]), ([3], [], [7]),
    ]  # fmt: skip
    table, segments = table_of(rows)
    plan = build_plan(
        table,
        list("abcde"),
        (SamplingParams(),),
        np.zeros(5, np.int64),
        kind_of_row=segments.kinds(),
    )
    plan = with_documents(plan, segments, Reuse("concat", VOCABULARY), np.zeros(5, np.int64))
    assert plan.reuse_depth.tolist() == [1 + 5, 1 + 5, 1 + 3, 0, 0]
    assert plan.documents is not None
    all_paths = plan.documents.paths
    paths = [all_paths[number].tolist() for number in range(len(all_paths))]
    of_x = plan.documents.terminal[paths.index([1, *x])]
    assert plan.group_of_row.tolist() == [of_x, of_x, of_x, -1, -1]
    alone = with_documents(
        plan, segments, Reuse("concat", VOCABULARY, False), np.zeros(5, np.int64)
    )
    assert alone.reuse_depth.tolist() == [1 + 5, 1 + 5, 1 + 3, 3, 0]


def test_epic_computes_the_first_tokens_of_all_documents_but_the_exact_one() -> None:
    parts = [np.array(part, np.int64) for part in ([7], [1, 2, 3], [4, 5, 6], [8])]
    below = arrange(parts, Reuse("epic", VOCABULARY, True, 2))
    assert [use.first for use in below.uses] == [1, 3]
    assert [(run.position, run.token_ids.tolist()) for run in below.runs] == [(4, [4, 5]), (7, [8])]
    alone = arrange(parts, Reuse("epic", VOCABULARY, False, 2))
    assert [use.first for use in alone.uses] == [2, 2]
    assert [run.position for run in alone.runs] == [1, 4, 7]


@pytest.mark.parametrize(("is_below", "repaired"), [(True, 0), (False, 2)])
def test_a_document_that_rows_compute_whole_is_encoded_for_nobody(
    is_below: bool, repaired: int
) -> None:
    """Seen red: the second and the third were encoded though no row looked at them."""
    rows: list[Row] = [([1], [[2, 3, 4], [5], [6, 7]], [8]), ([1], [[2, 3, 4], [6, 7]], [9])]
    table, segments = table_of(rows)
    reuse = Reuse("epic", VOCABULARY, is_below, 2)
    plan = plan_documents(table, np.arange(2), segments, reuse)
    own = [1 + 2 + 1 + repaired, 2 + 1 + repaired]
    assert plan.own.lengths.tolist() == own
    assert plan.tokens_to_compute(np.arange(2)) == 1 + 3 + sum(own)
    assert plan.repaired_tokens.tolist() == [repaired] * 2
    assert np.diff(plan.use_bounds).tolist() == [1, 1]


@pytest.mark.parametrize("documents", [1, 3])
def test_link_tokens_are_numbered_by_their_place(documents: int) -> None:
    parts = [np.zeros(2, np.int64), *[np.ones(3, np.int64)] * documents, np.ones(1, np.int64)]
    runs = arrange(parts, Reuse("kvlink", VOCABULARY, False, 0, 2)).runs
    assert [run.token_ids.tolist() for run in runs[:-1]] == [
        [VOCABULARY + 2 * i, VOCABULARY + 2 * i + 1] for i in range(documents)
    ]


def test_a_row_that_blends_keeps_a_copy_of_all_behind_its_preamble() -> None:
    rows: list[Row] = [
        ([1, 2], [[3, 4, 5], [6, 7]], [8]),
        ([], [[3, 4]], [8, 9]),
        ([1, 2], [], [7]),
    ]
    table, segments = table_of(rows)
    reuse = Reuse("cacheblend", VOCABULARY, blend_share=0.5)
    plan = plan_documents(table, np.arange(3), segments, reuse)
    assert plan.kept_tokens.tolist() == [6, 4, 1]
    assert plan.repaired_tokens.tolist() == [1, 0, 0], "the first document is exact"
    epic = plan_documents(table, np.arange(3), segments, Reuse("epic", VOCABULARY, epic_tokens=1))
    assert epic.kept_tokens.tolist() == [2, 2, 1]
