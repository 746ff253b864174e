"""Which sequences are on the device, and which KV ranges live. Knows no tensors but the cache's.

Sequences enter in depth-first order of the tree and leave when they end. A shared node's range is
acquired with the first sequence below it and released with the last one (engine.md §1): with all
prompts known there is nothing to guess and nothing to evict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kv_cache import KVCache, KVRange
from pipeline.engine.packing import SlotRange
from pipeline.plan.plan import Plan
from pipeline.records import SamplingParams

REFILL_BELOW = 0.75
"""New rows enter when so few of the rows of the last admission are left: prefill stays packed."""


@dataclass(eq=False, slots=True)
class LiveNode:
    """A shared node on the device. Its range covers prompt positions `[span_start, end)`.

    That is its own edge `[start, end)`; a group node's range begins with copies of the short edges
    between it and the group node above, so that decoding rows see one range for all of them.
    `unfinished`: sequences below that have not ended; `unread`: sequences that end exactly here
    and have not sampled their first token yet (`logits` [V] waits for them).
    """

    node: int
    above: LiveNode | None
    kv: KVRange
    start: int
    end: int
    span_start: int
    num_sequences: int
    unfinished: int
    unread: int
    prefill_s: float = 0.0
    logits: Tensor | None = None


@dataclass(eq=False, slots=True)
class LiveRow:
    """A sequence on the device. Its range holds positions from `span_start` to its last token.

    `start` is where the tokens begin that no other sequence shares.
    """

    sequence: int
    params: SamplingParams
    above: LiveNode | None
    kv: KVRange
    start: int
    end: int
    span_start: int
    cached_tokens: int
    admitted_s: float
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    has_ended: bool = False


@dataclass(eq=False, slots=True)
class PrefillJob:
    """Prompt positions `[done, target.end)` of a node or row that wait for a forward."""

    target: LiveNode | LiveRow
    token_ids: NDArray[np.int64]
    done: int


def _nodes_above(target: LiveNode | LiveRow) -> Iterator[LiveNode]:
    node = target.above
    while node is not None:
        yield node
        node = node.above


def spans_before(target: LiveNode | LiveRow, position: int) -> tuple[SlotRange, ...]:
    """Slots of the shared ranges that tile prompt positions `[0, position)`, top first.

    In prefill `position` is where the target's own tokens begin; a decoding row asks for all before
    its own range. A group node's range reaches back over the short edges above it.
    """
    spans: list[SlotRange] = []
    for node in _nodes_above(target):
        if node.end == position:
            spans.append((node.kv.start, node.kv.start + node.kv.length))
            position = node.span_start
    return tuple(reversed(spans))


def copied_head(target: LiveNode | LiveRow) -> NDArray[np.int64]:
    """Slots where the short shared edges `[span_start, start)` above `target` were computed."""
    slots = [np.zeros(0, np.int64)]
    for node in _nodes_above(target):
        if node.end <= target.span_start:
            break
        slots.append(np.arange(node.kv.start, node.kv.start + node.kv.length))
    return np.concatenate(slots[::-1])


class Scheduler:
    """Admission, release, and the order of prefill."""

    def __init__(
        self, plan: Plan, sequences: NDArray[np.int64], cache: KVCache, max_rows: int
    ) -> None:
        """`sequences`: ascending indices of the sequences that shall run."""
        self.plan = plan
        self.cache = cache
        self.max_rows = max_rows
        self.rows: list[LiveRow] = []
        self.waiting: deque[int] = deque(sequences.tolist())
        self._prompt_lengths = plan.prompt_lengths
        self._counts = active_counts(plan, sequences)
        self._ending = ending_counts(plan, sequences)
        self._nodes: dict[int, LiveNode] = {}
        self._refill_at = 0
        self.is_stuck = False

    def admit(self, now_s: float) -> list[PrefillJob]:
        """Let waiting sequences in while room lasts; what must be prefilled, parents first.

        Where not even the first one fits an otherwise idle device, `is_stuck` is True afterwards.
        """
        jobs: list[PrefillJob] = []
        if len(self.rows) > self._refill_at:
            return jobs
        while self.waiting and len(self.rows) < self.max_rows:
            admitted = self._admit_one(self.waiting[0], now_s)
            if admitted is None:
                self.is_stuck = not self.rows
                break
            self.waiting.popleft()
            jobs += admitted
        self._refill_at = int(len(self.rows) * REFILL_BELOW)
        return jobs

    def reject(self) -> int:
        """Give up on the next sequence: it does not fit an otherwise empty device."""
        self.is_stuck = False
        return self.waiting.popleft()

    def finish(self, row: LiveRow) -> None:
        """Release the row's range, and every node's that nobody below needs any more."""
        row.has_ended = True
        self.rows.remove(row)
        self.cache.release(row.kv)
        for node in _nodes_above(row):
            node.unfinished -= 1
            if node.unfinished == 0:
                self.cache.release(node.kv)
                del self._nodes[node.node]

    def rows_below(self, target: LiveNode | LiveRow) -> list[LiveRow]:
        """Live rows that need `target`: the row itself, or all below the node."""
        if isinstance(target, LiveRow):
            return [] if target.has_ended else [target]
        return [row for row in self.rows if target in _nodes_above(row)]

    def live_ranges(self) -> list[KVRange]:
        """Every range that is reserved now."""
        return [n.kv for n in self._nodes.values()] + [r.kv for r in self.rows]

    def _admit_one(self, sequence: int, now_s: float) -> list[PrefillJob] | None:
        """Jobs of one sequence, or None when its ranges do not fit (nothing is kept then)."""
        plan, prompt = self.plan, int(self.plan.sequences.prompt[sequence])
        path = plan.tree.path(int(plan.tree.terminal[prompt]))
        shared = [n for n in path if self._counts[n] > 1]
        fresh: list[LiveNode] = []
        above: LiveNode | None = None
        for node in shared:
            live = self._nodes.get(node) or self._acquire_node(node, above)
            if live is None:
                self._undo(fresh)
                return None
            if node not in self._nodes:
                fresh.append(live)
            above = live
        row = self._acquire_row(sequence, above, now_s)
        if row is None and not self.rows:
            # Nothing runs, so only the nodes above can be in the way: close the gaps between them.
            self.cache.compact(self.live_ranges() + [live.kv for live in fresh])
            row = self._acquire_row(sequence, above, now_s)
        if row is None:
            self._undo(fresh)
            return None
        ids = plan.prompt_token_ids(sequence).astype(np.int64)
        self._nodes.update((live.node, live) for live in fresh)
        self.rows.append(row)
        jobs = [PrefillJob(live, ids[live.start : live.end], live.start) for live in fresh]
        if row.start < row.end:
            jobs.append(PrefillJob(row, ids[row.start :], row.start))
        row.cached_tokens = row.end - sum(len(job.token_ids) for job in jobs)
        return jobs

    def _acquire_node(self, node: int, above: LiveNode | None) -> LiveNode | None:
        plan = self.plan
        start, end = int(plan.tree.start[node]), int(plan.tree.end[node])
        is_group = bool(plan.is_group[node])
        span_start = int(plan.anchor_end[node]) if is_group else start
        kv = self.cache.acquire(end - span_start, from_left=True)
        if kv is None:
            return None
        count = int(self._counts[node])
        return LiveNode(
            node, above, kv, start, end, span_start,
            num_sequences=count, unfinished=count, unread=int(self._ending[node]),
        )  # fmt: skip

    def _acquire_row(self, sequence: int, above: LiveNode | None, now_s: float) -> LiveRow | None:
        params = self.plan.params[int(self.plan.sequences.params[sequence])]
        end = int(self._prompt_lengths[sequence])
        start = above.end if above else 0
        span_start = self._group_end(above)
        # The last generated token is never fed back, so its KV needs no slot.
        kv = self.cache.acquire(end - span_start + params.max_new_tokens - 1, from_left=False)
        if kv is None:
            return None
        return LiveRow(sequence, params, above, kv, start, end, span_start, 0, now_s)

    def _group_end(self, node: LiveNode | None) -> int:
        """Prompt position up to which group nodes cover the path down to `node`."""
        while node is not None and not self.plan.is_group[node.node]:
            node = node.above
        return node.end if node else 0

    def _undo(self, fresh: list[LiveNode]) -> None:
        for live in fresh:
            self.cache.release(live.kv)


def active_counts(plan: Plan, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of `sequences` lie below each node: [nodes] int64."""
    chosen = np.zeros(len(plan.sequences) + 1, np.int64)
    chosen[sequences + 1] = 1
    before = np.cumsum(chosen)
    return before[plan.sequence_hi] - before[plan.sequence_lo]


def ending_counts(plan: Plan, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of `sequences` end exactly at each node: [nodes] int64."""
    terminal = plan.tree.terminal[plan.sequences.prompt[sequences]]
    return np.bincount(terminal, minlength=plan.tree.num_nodes)


def kv_tokens_if_all_at_once(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Slots that would hold every node and row of the job at the same time: an upper bound."""
    shared = active_counts(plan, sequences) > 1
    span_start = np.where(plan.is_group, plan.anchor_end, plan.tree.start)
    nodes = (plan.tree.end - span_start)[shared].sum()
    rows = plan.prompt_lengths[sequences] + plan.max_new_tokens[sequences] - 1
    return int(nodes + rows.sum())
