"""What a plan is worth, in numbers, and the plan as tables. Knows nothing about text or tensors."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.caching import MOST_ROWS, computed_by_blocks, computed_in_given_order
from pipeline.plan.plan import Names, Plan

_LARGEST_GROUPS = 10
_BLOCKS = (16, 256)  # tokens: vLLM's default, and what transformers shares
_CACHE_BYTES = 4 << 30  # of a prefix cache where no budget was named
_CACHE_TOKENS = 100_000  # and where the model is not known either
_EXAMPLE_IDS = 3
_IDS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class PlanSummary:
    """The content of `plan/summary.json`.

    `prompt_tokens` is T, `unique_tokens` U, `saving` 1 - U/T over the rows that can run;
    `max_new_tokens` the most tokens that the sequences may generate together, D. `gain_bound` is
    (T + D) / (U + D): no job of this shape can be sped up more by reuse, and a job that stops early
    or waits for memory less. `groups` are the distinct `group_id`s of the rows, `singletons` the
    rows without one. `saving_by_blocks`: at best in a prefix cache that shares whole blocks of so
    many tokens; `saving_in_given_order`: in an LRU cache of `cache_tokens` that meets the rows as
    the file has them, followed for `rows`. `rows_at_once`: the most neighbouring sequences whose KV
    fits the budget; `estimate` (device seconds, from rates measured here), `advice` and `warning`
    (what of the prompts is likely not meant): where somebody asks for a plan alone; `store`: of
    those tokens U that a KV store has, where there is one; `fields`: where a template lists some;
    `rejections`: why rows cannot run, where some are.
    Bytes are None where the model's shape is not known.
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
    saving_by_blocks: dict[str, float]
    saving_in_given_order: dict[str, float]
    max_new_tokens: int
    kv_bytes_per_token: int | None
    peak_kv_bytes: int | None
    kv_budget_bytes: int | None
    rows_at_once: int | None
    plan_hash: str
    estimate: dict[str, Any] | None = None
    advice: dict[str, Any] | None = None
    warning: str | None = None
    fields: dict[str, Any] | None = None
    store: dict[str, Any] | None = None
    rejections: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KVLimits:
    """What bounds the KV memory: bytes of one token over all layers, rows at a time, budget."""

    bytes_per_token: int | None
    max_rows: int
    budget: int | None


def summarise(plan: Plan, ids: Names, limits: KVLimits) -> PlanSummary:
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
        saving_by_blocks={
            str(size): 1.0 - computed_by_blocks(plan, size) / total if total else 0.0
            for size in _BLOCKS
        },
        saving_in_given_order=_saving_in_given_order(plan, limits),
        max_new_tokens=generated,
        kv_bytes_per_token=limits.bytes_per_token,
        peak_kv_bytes=_peak_kv_bytes(plan, limits),
        kv_budget_bytes=limits.budget,
        rows_at_once=_rows_at_once(plan, limits),
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


def _largest_groups(plan: Plan, ids: Names) -> list[dict[str, Any]]:
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


def _saving_in_given_order(plan: Plan, limits: KVLimits) -> dict[str, float]:
    if limits.bytes_per_token is None:
        capacity = _CACHE_TOKENS
    else:
        capacity = (limits.budget or _CACHE_BYTES) // limits.bytes_per_token
    computed, total = computed_in_given_order(plan, capacity)
    saving = 1.0 - computed / total if total else 0.0
    rows = min(MOST_ROWS, int((plan.sequence_of_row >= 0).sum()))
    return {"cache_tokens": capacity, "rows": rows, "saving": saving}


def _rows_at_once(plan: Plan, limits: KVLimits) -> int | None:
    """The widest window that fits; wider ones never need less."""
    if limits.bytes_per_token is None or limits.budget is None:
        return None
    room = limits.budget // limits.bytes_per_token
    widths = range(1, min(limits.max_rows, len(plan.sequences)) + 1)
    return bisect.bisect_right(widths, room, key=lambda width: peak_kv_tokens(plan, width))


def hash_plan(plan: Plan, ids: Names) -> str:
    """sha256 over everything that decides what runs and which row gets which answer."""
    digest = hashlib.sha256()
    for low in range(0, len(ids), _IDS_AT_A_TIME):
        names = "\x1f".join(ids[low : low + _IDS_AT_A_TIME])
        digest.update(f"{names}\x1f".encode())
    digest.update(repr(plan.params).encode())
    for low, high in plan.table.chunks():
        digest.update(plan.table.read_words(low, high).data)
    for array in (
        plan.table.lengths,
        plan.sequences.prompt,
        plan.sequences.params,
        plan.sequences.row,
        plan.sequences.noise_key,
        plan.sequence_of_row,
        plan.is_group,
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plan_frame(plan: Plan, ids: Names) -> pl.DataFrame:
    """`plan/plan.parquet`: every input row in execution order; rows that cannot run come last."""
    num = len(plan.sequences)
    sequence = np.where(plan.sequence_of_row < 0, num, plan.sequence_of_row)
    order = np.argsort(sequence, kind="stable")
    first = np.append(plan.sequences.row, -1)[sequence[order]]
    copied_from = np.where(first == order, -1, first)
    names = pl.Series(ids, dtype=pl.String)

    def or_null(values: NDArray[np.int64]) -> pl.Series:
        column = pl.Series(values)
        return column.set(column < 0, None)

    def of_sequence(values: NDArray[np.int64]) -> pl.Series:
        return or_null(np.append(values, -1)[sequence[order]])

    return pl.DataFrame(
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
    """[prompts + 1] input rows of the prompts before each."""
    runs = plan.sequence_of_row[plan.sequence_of_row >= 0]
    rows = np.bincount(plan.sequences.prompt[runs], minlength=plan.tree.num_prompts)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])


def tree_frame(plan: Plan) -> pl.DataFrame:
    """`plan/tree.parquet`: one row per node, depth first; `rows` counts the input rows below."""
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
