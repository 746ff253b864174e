"""From rows that are cut into segments to what is encoded once and what each row adds.

`documents.arrange` says it of one row; here it is said of all of them at once, and a test holds the
two together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.documents import DocumentPlan, Ids, Reuse, take_parts
from pipeline.plan.radix_tree import RadixTree, build_tree
from pipeline.plan.segment_table import Segments, number_segments
from pipeline.plan.sorting import sort_rows
from pipeline.plan.token_table import TokenTable, narrowest_dtype

_SEQUENCES_AT_A_TIME = 1 << 16


def plan_documents(
    table: TokenTable,
    rows: NDArray[np.int64],
    segments: Segments,
    reuse: Reuse,
    tenant: NDArray[np.integer] | None = None,
) -> DocumentPlan:
    """Of the sequences that answer `rows` of a table whose rows are cut as `segments` says.

    `tenant`: [rows of the table] as for `build_plan`; no path is shared between two of them.
    """
    tenants = np.zeros(len(table), np.int64) if tenant is None else tenant.astype(np.int64)
    cuts = _Cuts(table, rows, segments, reuse)
    seen = cuts.is_seen
    paths = _number_paths(table, segments, cuts, reuse, tenants[rows])
    own, run_bounds, run_position, run_length = _runs(table, cuts, reuse)
    return DocumentPlan(
        reuse, paths.ids, paths.tree, paths.terminal, paths.preamble,
        np.append(0, np.cumsum(seen))[cuts.use_bounds], paths.of_use,
        (cuts.before + cuts.own)[seen], (cuts.position - cuts.before)[seen],
        own, run_bounds, run_position, run_length,
    )  # fmt: skip


class _Cuts:
    """How rows are cut and arranged. By sequence: `preamble` and `question`, numbers of segments;
    `end` of its documents. By document, sequence after sequence: `document`, the number of the
    segment; `sequence`, `place` in its row; `length`, `start` in the table; `position` in the row,
    soft tokens counted; `before`, tokens of its path above it; `own` ones of the row, which does
    not look at it if these are all: `is_seen`."""

    def __init__(
        self, table: TokenTable, rows: NDArray[np.int64], segments: Segments, reuse: Reuse
    ) -> None:
        places, bounds = take_parts(segments.bounds, rows)
        self.preamble, self.question = places[bounds[:-1]], places[bounds[1:] - 1]
        is_document = np.ones(len(places), bool)
        is_document[bounds[:-1]] = is_document[bounds[1:] - 1] = False
        self.document = places[is_document]
        self.use_bounds = bounds - 2 * np.arange(len(bounds))
        counts = np.diff(self.use_bounds)
        self.sequence = np.repeat(np.arange(len(rows)), counts)
        self.place = np.arange(len(self.document)) - self.use_bounds[self.sequence]
        starts = segments.starts(table)
        self.start, self.question_start = starts[self.document], starts[self.question]
        self.length = segments.lengths[self.document]
        self.question_length = segments.lengths[self.question]
        preambles = segments.lengths[self.preamble]
        width = self.length + reuse.soft_tokens_per_document
        upto = np.append(0, np.cumsum(width))
        into = upto[:-1] - upto[self.use_bounds[self.sequence]]
        self.position = preambles[self.sequence] + into
        self.end = preambles + upto[self.use_bounds[1:]] - upto[self.use_bounds[:-1]]
        self.before = preambles[self.sequence] * reuse.is_below_preamble
        self.own = np.zeros(len(self.length), np.int64)
        if reuse.mode == "epic":
            is_exact = (self.place == 0) & reuse.is_below_preamble
            self.own = np.where(is_exact, 0, np.minimum(reuse.epic_tokens, self.length))
        self.is_seen = (self.own == 0) | (self.own < self.length)


class _Paths(NamedTuple):
    """`terminal`: of each path; `preamble`: [sequences], `of_use`: [documents that are seen] their
    paths."""

    ids: TokenTable
    tree: RadixTree
    terminal: NDArray[np.int64]
    preamble: NDArray[np.int64]
    of_use: NDArray[np.int64]


def _number_paths(
    table: TokenTable,
    segments: Segments,
    cuts: _Cuts,
    reuse: Reuse,
    tenant: NDArray[np.int64],
) -> _Paths:
    """`tenant`: of each sequence. Of two paths with the same ids that are cut differently only one
    is used."""
    chosen = np.zeros(len(segments.lengths), bool)
    document, sequence = cuts.document[cuts.is_seen], cuts.sequence[cuts.is_seen]
    chosen[cuts.preamble] = chosen[document] = True
    distinct = number_segments(table, segments, chosen)
    soft = reuse.vocabulary_size + np.arange(reuse.soft_rows * (reuse.mode == "packet"))
    head, tail = np.split(soft, 2)
    above = np.stack([tenant, distinct.number[cuts.preamble]], 1)
    contexts, context = np.unique(above, axis=0, return_inverse=True)
    of_use = context[sequence] if reuse.is_below_preamble else tenant[sequence]
    uses = np.stack([of_use, distinct.number[document]], 1)
    pairs, use = np.unique(uses, axis=0, return_inverse=True)
    ids = [distinct.ids[number] for number in contexts[:, 1].tolist()]
    tenants = [contexts[:, 0]]
    nothing = np.zeros(0, np.int64)
    for owner, number in pairs.tolist():
        before = ids[owner] if reuse.is_below_preamble else nothing
        ids.append(np.concatenate([before, head, distinct.ids[number], tail]))
    tenants.append(contexts[pairs[:, 0], 0] if reuse.is_below_preamble else pairs[:, 0])
    dtype = narrowest_dtype(reuse.vocabulary_size + reuse.soft_rows)
    lengths = np.array([len(some) for some in ids], np.int64)
    flat = np.concatenate([nothing, *ids]).astype(dtype)
    paths = TokenTable.from_batches([(flat, lengths)], dtype)
    order, shared = found = sort_rows(paths, np.concatenate(tenants))
    is_new = found.is_new(lengths[order])
    first = order[is_new]
    tree = build_tree(lengths[first], shared[is_new], first)
    same = np.full(len(paths), -1, np.int64)  # of the empty preamble
    same[order] = first[np.cumsum(is_new) - 1]
    terminal = np.full(len(paths), -1, np.int64)
    terminal[order] = tree.terminal[np.cumsum(is_new) - 1]
    return _Paths(paths, tree, terminal, same[context], same[len(contexts) + use])


def _runs(
    table: TokenTable, cuts: _Cuts, reuse: Reuse
) -> tuple[TokenTable, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Own ids of each sequence; bounds, positions and lengths of its runs."""
    links = reuse.soft_tokens if reuse.mode == "kvlink" else 0
    has_run = (cuts.own > 0) | (links > 0)
    length = np.where(links, links, cuts.own)[has_run]
    position = (cuts.position + (cuts.length if links else 0))[has_run]
    source = -1 - cuts.place[has_run] * links if links else cuts.start[has_run]
    sequence = cuts.sequence[has_run]
    counts = np.bincount(sequence, minlength=len(cuts.question)) + 1
    bounds = np.append(0, np.cumsum(counts))
    # The question's run is the last one of each sequence.
    is_question = np.zeros(bounds[-1], bool)
    is_question[bounds[1:] - 1] = True

    def merge(of_documents: NDArray[np.int64], of_questions: NDArray[np.int64]) -> Ids:
        merged = np.empty(bounds[-1], np.int64)
        merged[~is_question], merged[is_question] = of_documents, of_questions
        return merged

    lengths = merge(length, cuts.question_length)
    own = _gather(table, merge(source, cuts.question_start), lengths, bounds, reuse)
    return own, bounds, merge(position, cuts.end), lengths


def _gather(
    table: TokenTable,
    source: NDArray[np.int64],
    lengths: NDArray[np.int64],
    bounds: NDArray[np.int64],
    reuse: Reuse,
) -> TokenTable:
    """The ids of runs, end to end by sequence: from `source` on in the table's `flat`, or where
    that is negative, the soft ids from -1 - `source` on."""
    dtype = narrowest_dtype(reuse.vocabulary_size + reuse.soft_rows)
    upto = np.append(0, np.cumsum(lengths))
    batches = []
    for low in range(0, len(bounds) - 1, _SEQUENCES_AT_A_TIME):
        ends = bounds[low : low + _SEQUENCES_AT_A_TIME + 1]
        runs = slice(ends[0], ends[-1])
        into = np.arange(upto[ends[0]], upto[ends[-1]]) - np.repeat(upto[runs], lengths[runs])
        start = np.repeat(source[runs], lengths[runs])
        ids = table.flat[np.maximum(start + into, 0)].astype(np.int64)
        ids = np.where(start < 0, reuse.vocabulary_size - 1 - start + into, ids)
        batches.append((ids.astype(dtype), np.diff(upto[ends])))
    return TokenTable.from_batches(batches, dtype)
