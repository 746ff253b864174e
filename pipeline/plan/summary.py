"""What a plan is worth, in numbers. Knows nothing about text or tensors."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.caching import MOST_ROWS, computed_by_blocks, computed_in_given_order
from pipeline.plan.conversation_figures import count_conversations
from pipeline.plan.conversations import ConversationPlan
from pipeline.plan.documents import DocumentPlan
from pipeline.plan.peak import KVNeeds
from pipeline.plan.plan import Names, Plan
from pipeline.plan.scores import ScorePlan

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
    `documents`: where prompts are in segments; `conversations`: where rows are turns of some, T and
    D then as if every answer were as long as allowed; `scores`: where rows are scored, and all but
    the first two numbers are of their requests; `rejections`: why rows cannot run, where some are;
    `cost`: as of `Cost`, where somebody says what an hour costs.
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
    documents: dict[str, Any] | None = None
    conversations: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None

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
    runs, whole = plan.sequence_of_row >= 0, plan.whole_rows
    at_once = _rows_at_once(plan, limits)
    carried = count_conversations(plan, limits.bytes_per_token, at_once)
    total = int(plan.table.lengths[runs].sum()) if carried is None else carried.resent_tokens
    unique = plan.tokens_to_compute(np.arange(len(plan.sequences)))
    generated = int(plan.answer_tokens.sum())
    group = plan.group_of_row[whole]
    return PlanSummary(
        rows=len(plan.table),
        rows_rejected=int((~runs).sum()),
        distinct_prompts=plan.tree.num_prompts,
        sequences=len(plan.sequences),
        prompt_tokens=total,
        unique_tokens=unique,
        saving=max(0.0, 1.0 - unique / total) if total else 0.0,  # turns compute more
        gain_bound=(total + generated) / (unique + generated) if total else 1.0,
        groups=len(np.unique(group[group >= 0])),
        singletons=int((group < 0).sum()),
        depth_histogram=depth_histogram(plan.reuse_depth[whole]),
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
        rows_at_once=at_once,
        plan_hash=hash_plan(plan, ids),
        conversations=None if carried is None else carried.to_json(),
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
    end = (plan.documents or plan).tree.end
    return [
        {
            "group_id": group_id,
            "rows": rows,
            "prefix_tokens": int(end[group_id]),
            "example_ids": list(dict.fromkeys(ids[row] for row in examples)),
        }
        for group_id, rows, examples in largest.iter_rows()
    ]


def _peak_kv_bytes(plan: Plan, limits: KVLimits) -> int | None:
    if limits.bytes_per_token is None:
        return None
    peak = KVNeeds.of(plan).peak(limits.max_rows) * limits.bytes_per_token
    return peak if limits.budget is None else min(peak, limits.budget)


def _saving_in_given_order(plan: Plan, limits: KVLimits) -> dict[str, float]:
    if limits.bytes_per_token is None:
        capacity = _CACHE_TOKENS
    else:
        capacity = (limits.budget or _CACHE_BYTES) // limits.bytes_per_token
    computed, total = computed_in_given_order(plan, capacity)
    saving = 1.0 - computed / total if total else 0.0
    rows = min(MOST_ROWS, len(plan.whole_rows))
    return {"cache_tokens": capacity, "rows": rows, "saving": saving}


def _rows_at_once(plan: Plan, limits: KVLimits) -> int | None:
    """The widest window that fits; wider ones never need less."""
    if limits.bytes_per_token is None or limits.budget is None:
        return None
    room = limits.budget // limits.bytes_per_token
    widths = range(1, min(limits.max_rows, len(plan.sequences)) + 1)
    return bisect.bisect_right(widths, room, key=KVNeeds.of(plan).peak)


def hash_plan(plan: Plan, ids: Names) -> str:
    """sha256 over everything that decides what runs and which row gets which answer."""
    digest = hashlib.sha256()
    for low in range(0, len(ids), _IDS_AT_A_TIME):
        names = "\x1f".join(ids[low : low + _IDS_AT_A_TIME])
        digest.update(f"{names}\x1f".encode())
    digest.update(repr(plan.params).encode())
    if plan.conversations is not None:
        digest.update(repr(plan.conversations.eviction).encode())
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
        *_decisive(plan.documents),
        *_turns(plan.conversations),
        *_read(plan.scores),
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _decisive(documents: DocumentPlan | None) -> list[NDArray[np.int64]]:
    if documents is None:
        return []
    names = "use_bounds", "use_path", "use_first", "use_shift", "run_bounds", "run_position"
    return [getattr(documents, name) for name in names]


def _read(scores: ScorePlan | None) -> list[NDArray[np.int64]]:
    if scores is None:
        return []
    names = "bounds", "request", "token_bounds", "target_of_token", "target_point", "target_id"
    return [getattr(scores, name) for name in (*names, "point_node", "point_position")]


def _turns(turns: ConversationPlan | None) -> list[NDArray[Any]]:
    if turns is None:
        return []
    return [turns.bounds, turns.row, turns.params, turns.noise_key, turns.system_tokens]
