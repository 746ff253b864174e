"""The plan as tables, for files and pages. Knows nothing about text or tensors."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.document_order import run_order
from pipeline.plan.documents import DocumentPlan
from pipeline.plan.plan import Names, Plan


def plan_frame(plan: Plan, ids: Names) -> pl.DataFrame:
    """`plan/plan.parquet`: every input row in execution order; rows that cannot run come last.

    Of turns of conversations, `prompt_tokens` are those that they add; `turn` counts from 0.
    """
    num = len(plan.sequences)
    sequence = np.where(plan.sequence_of_row < 0, num, plan.sequence_of_row)
    place = np.arange(num + 1)
    if plan.documents is not None:
        place[run_order(plan.documents, np.arange(num))] = np.arange(num)
    turn = _turn_of_row(plan)
    order = np.lexsort((turn, place[sequence]))
    first = np.append(plan.sequences.row, -1)[sequence[order]]
    copied_from = np.where((first == order) | (turn[order] > 0), -1, first)
    names = pl.Series(ids, dtype=pl.String)

    def or_null(values: NDArray[np.int64]) -> pl.Series:
        column = pl.Series(values)
        return column.set(column < 0, None)

    def of_sequence(values: NDArray[np.int64]) -> pl.Series:
        return or_null(np.append(values, -1)[sequence[order]])

    frame = pl.DataFrame(
        {
            "row_index": order,
            "id": names.gather(order),
            "sequence": or_null(plan.sequence_of_row[order]),
            "prompt": of_sequence(plan.sequences.prompt),
            "group_id": or_null(plan.group_of_row[order]),
            "reuse_depth": plan.reuse_depth[order],
            "prompt_tokens": plan.table.lengths[order],
            "max_new_tokens": of_sequence(plan.max_new_tokens),
            "dedup_of": names.gather(or_null(copied_from)),
        }
    )
    if plan.conversations is None:
        return frame
    turns = plan.conversations
    new = np.full(len(order), -1)
    new[turns.row] = np.array([p.max_new_tokens for p in plan.params], np.int64)[turns.params]
    number = np.where(plan.sequence_of_row < 0, -1, turn)
    return frame.with_columns(
        or_null(new[order]).alias("max_new_tokens"), or_null(number[order]).alias("turn")
    )


def _turn_of_row(plan: Plan) -> NDArray[np.int64]:
    """[rows] how many turns of its conversation come before; 0 without any."""
    number = np.zeros(len(plan.table), np.int64)
    turns = plan.conversations
    if turns is not None:
        first = np.repeat(turns.bounds[:-1], np.diff(turns.bounds))
        number[turns.row] = np.arange(len(turns.row)) - first
    return number


def largest_nodes(plan: Plan, at_most: int = 400) -> NDArray[np.int64]:
    """The nodes with most rows x tokens, first to last: [nodes, 4] int64.

    Columns are the first row below, the last + 1, start and end; rows count in execution order.
    """
    rows = _rows_before_prompt(plan)
    low, high = rows[plan.tree.prompt_lo], rows[plan.tree.prompt_hi]
    area = (high - low) * plan.tree.edge_lengths
    chosen = np.sort(np.argsort(-area, kind="stable")[:at_most])
    return np.stack([low, high, plan.tree.start, plan.tree.end], 1)[chosen]


def _rows_before_prompt(plan: Plan) -> NDArray[np.int64]:
    """[prompts + 1] input rows of the prompts before each; later turns are in no tree."""
    runs = plan.sequence_of_row[plan.whole_rows]
    rows = np.bincount(plan.sequences.prompt[runs], minlength=plan.tree.num_prompts)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])


def tree_frame(plan: Plan) -> pl.DataFrame:
    """`plan/tree.parquet`: one row per node, depth first; `rows` counts the input rows below.

    Where documents are reused at any position it is their tree, and rows need several of its nodes.
    """
    if plan.documents is not None:
        return _document_frame(plan, plan.documents)
    tree = plan.tree
    upto = _rows_before_prompt(plan)
    return pl.DataFrame(
        {
            "node": np.arange(tree.num_nodes),
            "parent": tree.parent,
            "start": tree.start,
            "end": tree.end,
            "prompt_lo": tree.prompt_lo,
            "prompt_hi": tree.prompt_hi,
            "rows": upto[tree.prompt_hi] - upto[tree.prompt_lo],
            "is_group": plan.is_group,
        }
    ).with_columns(parent=pl.col("parent").replace(-1, None))


def _document_frame(plan: Plan, documents: DocumentPlan) -> pl.DataFrame:
    tree = documents.tree
    users, bounds = documents.users(np.arange(len(plan.sequences)))
    copies = np.bincount(plan.sequence_of_row[plan.sequence_of_row >= 0])
    upto = np.append(0, np.cumsum(copies[users]))
    rows = upto[bounds[1:]] - upto[bounds[:-1]]
    return pl.DataFrame(
        {
            "node": np.arange(tree.num_nodes),
            "parent": tree.parent,
            "start": tree.start,
            "end": tree.end,
            "prompt_lo": tree.prompt_lo,
            "prompt_hi": tree.prompt_hi,
            "rows": rows,
            "is_group": rows > 1,
        }
    ).with_columns(parent=pl.col("parent").replace(-1, None))
