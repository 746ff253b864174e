"""What a plan is worth, in numbers, and the plan as tables. Knows nothing about text or tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.plan import Plan

_LARGEST_GROUPS = 10
_EXAMPLE_IDS = 3


@dataclass(frozen=True)
class PlanSummary:
    """The content of `plan/summary.json`.

    `prompt_tokens` is T, `unique_tokens` U, `saving` 1 - U/T over the rows that can run;
    `max_new_tokens` the most tokens that the sequences may generate together, D. `gain_bound` is
    (T + D) / (U + D): no job of this shape can be sped up more by reuse, and a job that stops early
    or waits for memory less. `groups` are the distinct `group_id`s of the rows, `singletons` the
    rows without one. Bytes are None where the model's shape is not known.
    """

    rows: int
    rows_rejected: int
    distinct_prompts: int
    sequences: int
    prompt_tokens: int
    unique_tokens: int
    saving: float
    gain_bound: float
    groups: int
    singletons: int
    depth_histogram: list[dict[str, int]]
    largest_groups: list[dict[str, Any]]
    max_new_tokens: int
    kv_bytes_per_token: int | None
    peak_kv_bytes: int | None
    kv_budget_bytes: int | None
    plan_hash: str

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class KVLimits:
    """What bounds the KV memory: bytes of one token over all layers, rows at a time, budget."""

    bytes_per_token: int | None
    max_rows: int
    budget: int | None


def summarise(plan: Plan, ids: Sequence[str], limits: KVLimits) -> PlanSummary:
    """Describe `plan`; `ids[i]` is the id of table row i."""
    runs = plan.sequence_of_row >= 0
    total = int(plan.table.lengths[runs].sum())
    unique = plan.tree.unique_tokens
    generated = int(plan.max_new_tokens.sum())
    group = plan.group_of_row[runs]
    return PlanSummary(
        rows=len(plan.table),
        rows_rejected=int((~runs).sum()),
        distinct_prompts=plan.tree.num_prompts,
        sequences=len(plan.sequences),
        prompt_tokens=total,
        unique_tokens=unique,
        saving=1.0 - unique / total if total else 0.0,
        gain_bound=(total + generated) / (unique + generated) if total else 1.0,
        groups=len(np.unique(group[group >= 0])),
        singletons=int((group < 0).sum()),
        depth_histogram=depth_histogram(plan.reuse_depth[runs]),
        largest_groups=_largest_groups(plan, ids),
        max_new_tokens=generated,
        kv_bytes_per_token=limits.bytes_per_token,
        peak_kv_bytes=_peak_kv_bytes(plan, limits),
        kv_budget_bytes=limits.budget,
        plan_hash=hash_plan(plan, ids),
    )


def depth_histogram(reuse_depth: NDArray[np.int64]) -> list[dict[str, int]]:
    """Rows by reuse depth: `[0, 1)`, then `[1, 2)`, `[2, 4)`, `[4, 8)` ... up to the deepest."""
    if not len(reuse_depth):
        return []
    last = int(reuse_depth.max()).bit_length()
    edges = np.array([0, *(1 << n for n in range(last + 1))], np.int64)
    counts = np.histogram(reuse_depth, edges)[0]
    return [
        {"from": int(low), "to": int(high), "rows": int(rows)}
        for low, high, rows in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _largest_groups(plan: Plan, ids: Sequence[str]) -> list[dict[str, Any]]:
    frame = pl.DataFrame({"group_id": plan.group_of_row, "row": np.arange(len(plan.table))})
    largest = (
        frame.filter(pl.col("group_id") >= 0)
        .group_by("group_id")
        .agg(rows=pl.len(), examples=pl.col("row").sort().head(_EXAMPLE_IDS))
        .sort("rows", "group_id", descending=[True, False])
        .head(_LARGEST_GROUPS)
    )
    return [
        {
            "group_id": group_id,
            "rows": rows,
            "prefix_tokens": int(plan.tree.end[group_id]),
            "example_ids": [ids[row] for row in examples],
        }
        for group_id, rows, examples in largest.iter_rows()
    ]


def peak_kv_tokens(plan: Plan, max_rows: int) -> int:
    """The most KV tokens alive at once when at most `max_rows` neighbouring sequences run together.

    A window `[w, w + R)` of sequences holds their own spans and every group node that any of them
    lies below, that is nodes with `sequence_lo < w + R` and `sequence_hi > w`.
    """
    num = len(plan.sequences)
    if not num:
        return 0
    width = min(max_rows, num)
    group = plan.group_of_row[plan.sequences.row]
    covered = np.where(group >= 0, plan.tree.end[group], 0)
    own = plan.prompt_lengths - covered + plan.max_new_tokens
    upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
    in_window = upto[width:] - upto[:-width]
    nodes = np.flatnonzero(plan.is_group)
    span = plan.tree.end[nodes] - plan.anchor_end[nodes]
    change = np.zeros(num + 1, np.int64)
    np.add.at(change, np.maximum(plan.sequence_lo[nodes] - width + 1, 0), span)
    np.add.at(change, plan.sequence_hi[nodes], -span)
    return int((in_window + np.cumsum(change)[: len(in_window)]).max())


def _peak_kv_bytes(plan: Plan, limits: KVLimits) -> int | None:
    if limits.bytes_per_token is None:
        return None
    peak = peak_kv_tokens(plan, limits.max_rows) * limits.bytes_per_token
    return peak if limits.budget is None else min(peak, limits.budget)


def hash_plan(plan: Plan, ids: Sequence[str]) -> str:
    """sha256 over everything that decides what runs and which row gets which answer."""
    digest = hashlib.sha256()
    digest.update("\x1f".join(ids).encode())
    digest.update(repr(plan.params).encode())
    for array in (
        plan.table.offsets,
        plan.table.flat.astype(np.uint32),
        plan.sequences.prompt,
        plan.sequences.params,
        plan.sequences.row,
        plan.sequences.noise_key,
        plan.sequence_of_row,
        plan.is_group,
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plan_frame(plan: Plan, ids: Sequence[str]) -> pl.DataFrame:
    """`plan/plan.parquet`: every input row in execution order; rows that cannot run come last."""
    rows = np.arange(len(plan.table))
    runs = plan.sequence_of_row >= 0
    sequence = np.where(runs, plan.sequence_of_row, len(plan.sequences))
    order = np.lexsort((rows, sequence))
    first = np.append(plan.sequences.row, -1)[sequence]
    prompt = np.append(plan.sequences.prompt, -1)[sequence]
    most = np.append(plan.max_new_tokens, -1)[sequence]
    dedup_of = [
        ids[head] if head not in (-1, row) else None
        for row, head in zip(rows[order].tolist(), first[order].tolist(), strict=True)
    ]

    def or_null(values: NDArray[np.int64]) -> pl.Expr:
        return pl.lit(pl.Series(values[order])).replace(-1, None)

    return pl.select(
        row_index=pl.Series(order),
        id=pl.Series([ids[row] for row in order.tolist()], dtype=pl.String),
        sequence=or_null(plan.sequence_of_row),
        prompt=or_null(prompt),
        group_id=or_null(plan.group_of_row),
        reuse_depth=pl.Series(plan.reuse_depth[order]),
        prompt_tokens=pl.Series(plan.table.lengths[order]),
        max_new_tokens=or_null(most),
        dedup_of=pl.Series(dedup_of, dtype=pl.String),
    )


def tree_frame(plan: Plan) -> pl.DataFrame:
    """`plan/tree.parquet`: one row per node, depth first; `rows` counts the input rows below."""
    tree = plan.tree
    rows_of_prompt = np.bincount(
        plan.sequences.prompt[plan.sequence_of_row[plan.sequence_of_row >= 0]],
        minlength=tree.num_prompts,
    )
    upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows_of_prompt)])
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
