"""A plan whose documents are reused at any position, and what that means for its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.document_planning import plan_documents
from pipeline.plan.documents import DocumentPlan, Reuse, distinct
from pipeline.plan.plan import Plan
from pipeline.plan.segment_table import Segments


def with_documents(
    plan: Plan, segments: Segments, reuse: Reuse, tenant: NDArray[np.integer]
) -> Plan:
    """The same rows and sequences; depth and group of a row are those of its documents.

    A row's depth: the tokens of its prompt that another row needs as well. Its group: the document
    that most rows have, by the node of the documents' tree where it ends; -1 where it has none in
    common with another row.
    """
    documents = plan_documents(plan.table, plan.sequences.row, segments, reuse, tenant)
    runs = np.flatnonzero(plan.sequence_of_row >= 0)
    sequence = plan.sequence_of_row[runs]
    rows = np.bincount(sequence, minlength=len(plan.sequences))
    reuse_depth = np.zeros(len(plan.table), np.int64)
    reuse_depth[runs] = _shared_tokens(documents, rows)[sequence]
    is_copied = rows[sequence] > 1
    reuse_depth[runs[is_copied]] = plan.table.lengths[runs[is_copied]]
    group_of_row = np.full(len(plan.table), -1, np.int64)
    group_of_row[runs] = _most_used(documents, rows)[sequence]
    return replace(plan, documents=documents, reuse_depth=reuse_depth, group_of_row=group_of_row)


class DocumentCounts(NamedTuple):
    """Of each row of a table, or of each sequence. Arrays int64.

    `documents` and their `document_tokens`; `repaired_tokens` of these that the row computes itself
    although they are stored; `soft_tokens`, which an adapter adds to its prompt.
    """

    documents: NDArray[np.int64]
    document_tokens: NDArray[np.int64]
    repaired_tokens: NDArray[np.int64]
    soft_tokens: NDArray[np.int64]


def count_documents(plan: Plan, segments: Segments) -> DocumentCounts:
    """Of each row of the table; rows that are copied from another have nothing repaired."""
    first, stop = segments.bounds[:-1], segments.bounds[1:]
    upto = np.append(0, np.cumsum(segments.lengths))
    is_cut = stop > first
    own_ends = np.append(segments.lengths, 0)
    around = np.where(is_cut, own_ends[first] + own_ends[stop - 1], 0)
    repaired, soft = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
    if plan.documents is not None:
        rows = plan.sequences.row
        added = plan.documents.prompt_ends - plan.prompt_lengths
        runs = np.flatnonzero(plan.sequence_of_row >= 0)
        soft[runs] = added[plan.sequence_of_row[runs]]
        repaired[rows] = plan.documents.repaired_tokens
    return DocumentCounts(
        np.maximum(stop - first - 2, 0), upto[stop] - upto[first] - around, repaired, soft
    )


def _shared_tokens(documents: DocumentPlan, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[sequences] tokens of nodes that other rows need as well; `rows`: of each sequence."""
    user, bounds = documents.users(np.arange(len(rows)))
    node = np.repeat(np.arange(documents.tree.num_nodes), np.diff(bounds))
    users = np.bincount(node, rows[user], documents.tree.num_nodes)
    shared = np.where(users[node] > 1, documents.tree.edge_lengths[node], 0)
    return np.bincount(user, shared, len(rows)).astype(np.int64)


def _most_used(documents: DocumentPlan, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[sequences] the node of the document that most rows have; -1 where no other row has one."""
    sequence = np.repeat(np.arange(len(rows)), np.diff(documents.use_bounds))
    num_paths = len(documents.terminal)
    of, path = np.divmod(distinct(sequence * num_paths + documents.use_path), num_paths)
    users = np.bincount(path, rows[of], num_paths)
    order = np.lexsort((path, -users[path], of))
    of, path = of[order], path[order]
    is_first = np.ones(len(of), bool)
    is_first[1:] = of[1:] != of[:-1]
    of, path = of[is_first], path[is_first]
    found = np.full(len(rows), -1, np.int64)
    found[of] = np.where(users[path] > 1, documents.terminal[path], -1)
    return found
