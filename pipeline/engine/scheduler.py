"""Which sequences are on the device, and which KV ranges live. Knows no tensors but the cache's.

Sequences enter in depth-first order of the tree and leave when they end. A shared node's range is
acquired with the first sequence below it and released with the last one (ARCHITECTURE.md): with all
prompts known there is nothing to guess.

Rows are admitted with room for a few new tokens and get more as they grow. Where there is no more,
the last row in depth-first order gives up its KV and waits again, first in the queue, with what it
has generated; the KV is computed again when it comes back. Hence every live row comes before every
waiting one, the first live row is never preempted, and alone it always finds room: only sequences
that fit the whole budget to their end are admitted at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import KVStates
from pipeline.engine.kv_cache import KVCache, KVRange
from pipeline.engine.live import BLOCK_TOKENS, LiveNode, LiveRow, PrefillJob, nodes_above
from pipeline.plan.plan import Plan

REFILL_BELOW = 0.75
"""New rows enter when so few of the rows of the last admission are left: prefill stays packed."""
LIKELY_SHARE = 0.75
"""Rows are expected to reach this share of the mean answer so far: they are not all old at once."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What `admit` decided: jobs, parents first; rows that need no forward; rows too large."""

    jobs: list[PrefillJob] = field(default_factory=list)
    ready: list[LiveRow] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """What was computed before this scheduler: work that is done again is not counted twice.

    `nodes`: shared nodes; `cached_tokens`: of sequences that were admitted; `forgotten`: sequences
    that the caller took back.
    """

    nodes: set[int] = field(default_factory=set)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)


class Scheduler:
    """Admission, growth, preemption, release, and the order of prefill."""

    def __init__(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        cache: KVCache,
        max_rows: int,
        history: History | None = None,
        on_release: Callable[[LiveNode], None] = lambda node: None,
        states: KVStates | None = None,
    ) -> None:
        """`sequences`: ascending indices of the sequences that shall run.

        `on_release` is called with each node that is about to give its range back. `states`: what
        earlier runs have computed.
        """
        self.plan = plan
        self.cache = cache
        self.max_rows = max_rows
        self.rows: list[LiveRow] = []
        self.waiting: deque[int] = deque(sequences.tolist())
        self.changes = 0
        """Grows whenever a live row comes, goes, or gets a block, or a range moves."""
        self._history = history or History()
        self._on_release = on_release
        self._states = states
        self._prompt_lengths = plan.prompt_lengths
        self._counts = plan.count_below(sequences)
        self._ending = ending_counts(plan, sequences)
        self._nodes: dict[int, LiveNode] = {}
        self._preempted: dict[int, LiveRow] = {}
        self._refill_at = 0
        self._ended_rows = 0
        self._ended_tokens = 0

    @property
    def has_begun(self) -> bool:
        """Whether some row has tokens and has not ended, be it live or preempted."""
        return bool(self.rows or self._preempted)

    def admit(self, now_s: float, *, only_begun: bool = False) -> Admission:
        """Let waiting sequences in while room lasts; with `only_begun` the preempted ones alone."""
        admission = Admission()
        if len(self.rows) > self._refill_at:
            return admission
        spoken_for = sum(self._likely_growth(row, row.kv_end) for row in self.rows)
        while self.waiting and len(self.rows) < self.max_rows:
            sequence = self.waiting[0]
            if only_begun and sequence not in self._preempted:
                break
            row = self._preempted.get(sequence) or self._new_row(sequence, now_s)
            path = [*nodes_above(row)][::-1]
            if _slots(path) + row.kv_limit - row.span_start > self.cache.capacity:
                admission.refused.append(self.waiting.popleft())
                self._leave(row)
            elif self._has_room_for(row, path, spoken_for):
                self._admit_one(row, path, admission)
                spoken_for += self._likely_growth(row, row.kv_end)
            else:
                break
        self._refill_at = int(len(self.rows) * REFILL_BELOW)
        return admission

    def not_begun(self) -> list[int]:
        """Sequences that were never admitted, in order."""
        return list(self.waiting)[len(self._preempted) :]

    def forget(self, count: int) -> None:
        """Drop the last `count` of those that have not begun."""
        for _ in range(count):
            sequence = self.waiting.pop()
            self._history.forgotten.add(sequence)
            self._leave(self._new_row(sequence, 0.0))
        self.changes += 1  # a node that nobody needs any more has given back its range

    def grow(self) -> None:
        """Give every live row a slot for its next token; the last rows make room where it ends."""
        for row in list(self.rows):
            while row.blocks and row.next_position >= row.kv_end and not self._extend(row):
                self._make_room()

    def finish(self, row: LiveRow) -> None:
        """Release the row's blocks, and every node's range that nobody below needs any more."""
        row.has_ended = True
        self._ended_rows += 1
        self._ended_tokens += len(row.token_ids)
        self._take_off(row)
        self._leave(row)

    def evict_idle(self) -> None:
        """Release the ranges of nodes without live rows; they are computed again when needed."""
        for node in self._idle_nodes():
            self._evict(node)

    def note_computed(self, node: LiveNode) -> None:
        """All of the node's KV is there; if it must be computed once more, that is a repeat."""
        node.was_computed = True
        self._history.nodes.add(node.node)

    def rows_below(self, target: LiveNode | LiveRow) -> list[LiveRow]:
        """Live rows that need `target`: the row itself, or all below the node."""
        if isinstance(target, LiveRow):
            return [] if target.has_ended else [target]
        return [row for row in self.rows if target in nodes_above(row)]

    def live_ranges(self) -> list[KVRange]:
        """Every range that is reserved now."""
        of_nodes = [node.kv for node in self._nodes.values() if node.is_resident]
        return of_nodes + [block for row in self.rows for block in row.blocks]

    def _new_row(self, sequence: int, now_s: float) -> LiveRow:
        plan, above = self.plan, None
        for node in plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequence]])):
            if self._counts[node] > 1:
                above = self._nodes.get(node) or self._new_node(node, above, sequence)
        end = int(self._prompt_lengths[sequence])
        return LiveRow(
            sequence,
            plan.params[int(plan.sequences.params[sequence])],
            above,
            start=above.end if above else 0,
            end=end,
            span_start=self._group_end(above),
            admitted_s=now_s,
            stored_end=min(self._stored_end(above, sequence, end), end - 1),
        )

    def _new_node(self, node: int, above: LiveNode | None, sequence: int) -> LiveNode:
        """`sequence` is one of those below."""
        plan, count = self.plan, int(self._counts[node])
        start, end = int(plan.tree.start[node]), int(plan.tree.end[node])
        unread = int(self._ending[node])
        stored_end = self._stored_end(above, sequence, end)
        live = self._nodes[node] = LiveNode(
            node,
            above,
            start,
            end,
            span_start=int(plan.anchor_end[node]) if plan.is_group[node] else start,
            num_sequences=count,
            unfinished=count,
            unread=unread,
            # A prompt that ends here needs the logits of its last token, which nobody stores.
            stored_end=min(stored_end, end - 1) if unread else stored_end,
            was_computed=node in self._history.nodes,
        )
        return live

    def _stored_end(self, above: LiveNode | None, sequence: int, end: int) -> int:
        """Position up to which an earlier run's KV can be loaded for a node or row below `above`.

        What is not stored above is not stored below, but for a last token that logits are made of.
        """
        if self._states is None or (above is not None and above.stored_end < above.end - 1):
            return 0
        return self._states.stored_end(sequence, end)

    def _group_end(self, node: LiveNode | None) -> int:
        """Prompt position up to which group nodes cover the path down to `node`."""
        while node is not None and not self.plan.is_group[node.node]:
            node = node.above
        return node.end if node else 0

    def _has_room_for(self, row: LiveRow, path: list[LiveNode], spoken_for: int) -> bool:
        """Whether the row can enter now. Where nothing runs it can: all that is left is its path.

        For a node that lost its rows is evicted before a row further up the queue is preempted.
        """
        if not self.rows:
            return True
        absent = [node for node in path if not node.is_resident]
        needed = _slots(absent) + row.first_block_end - row.span_start
        growth = self._likely_growth(row, row.first_block_end)
        return needed + growth + spoken_for <= self.cache.free_tokens

    def _likely_growth(self, row: LiveRow, kv_end: int) -> int:
        """Slots beyond `kv_end` that the row will ask for, going by the rows that have ended."""
        likely = int(LIKELY_SHARE * self._ended_tokens / max(1, self._ended_rows))
        return max(0, min(row.end + likely, row.kv_limit) - kv_end)

    def _admit_one(self, row: LiveRow, path: list[LiveNode], admission: Admission) -> None:
        """Acquire what is missing on the row's path, parents first, and its own first block."""
        ids = self.plan.prompt_token_ids(row.sequence).astype(np.int64)
        jobs = []
        for node in path:
            node.live_rows += 1
            if not node.is_resident:
                node.kv = self._acquire(node.end - node.span_start, from_left=True)
                own = ids[node.start : node.end]
                jobs.append(self._job(node, own, node.was_computed, row.sequence))
        row.kv_end = row.first_block_end
        length, reach = row.kv_end - row.span_start, row.kv_limit - row.span_start
        row.blocks = [self._acquire(length, from_left=False, reach=reach)]
        self._preempted.pop(row.sequence, None)
        own = np.concatenate([ids[row.start :], np.array(row.token_ids[:-1], np.int64)])
        known = self._history.cached_tokens
        if len(own):
            jobs.append(self._job(row, own, row.sequence in known, row.sequence))
        else:
            admission.ready.append(row)
        if row.sequence not in known:
            first = sum(job.end - job.done for job in jobs if not job.is_repeat)
            known[row.sequence] = row.end - first
        row.cached_tokens = known[row.sequence]
        admission.jobs.extend(jobs)
        self.rows.append(row)
        self.waiting.popleft()
        self.changes += 1

    def _job(
        self, target: LiveNode | LiveRow, own: NDArray[np.int64], is_repeat: bool, sequence: int
    ) -> PrefillJob:
        """What is to be computed of `own`, the ids from `target.start` on; the rest is loaded."""
        job = PrefillJob(target, own, target.start, is_repeat)
        if self._states is not None and target.stored_end > target.start:
            job.loaded = self._states.load(sequence, target.span_start, target.stored_end)
            job.done = target.start if job.loaded is None else target.stored_end
        return job

    def _extend(self, row: LiveRow) -> bool:
        """Lengthen the row's last block, or add one; False where too few slots are free."""
        left = row.kv_limit - row.kv_end
        length = min(BLOCK_TOKENS, left)
        if length > self.cache.free_tokens:
            return False
        if not self.cache.extend(row.blocks[-1], length):
            row.blocks.append(self._acquire(length, from_left=False, reach=left))
            self.changes += 1
        row.kv_end += length
        return True

    def _acquire(self, length: int, *, from_left: bool, reach: int = 0) -> KVRange:
        """A range of `length` slots, which must be free; the gaps are closed where none is wide."""
        kv = self.cache.acquire(length, from_left=from_left, reach=reach)
        if kv is None:
            self.cache.compact(self.live_ranges())  # the caller counts a change
            kv = self.cache.acquire(length, from_left=from_left, reach=reach)
        assert kv is not None, f"{length} slots wanted, {self.cache.free_tokens} free"
        return kv

    def _make_room(self) -> None:
        """Evict the last idle node, or else preempt the last row, in depth-first order."""
        idle = self._idle_nodes()
        if idle:
            self._evict(max(idle, key=lambda node: node.node))
            return
        row = self.rows[-1]
        self._take_off(row)
        self._preempted[row.sequence] = row
        self.waiting.appendleft(row.sequence)
        self._refill_at = min(self._refill_at, len(self.rows) - 1)  # some row must end first

    def _idle_nodes(self) -> list[LiveNode]:
        return [n for n in self._nodes.values() if n.is_resident and not n.live_rows]

    def _evict(self, node: LiveNode) -> None:
        self._on_release(node)
        self.cache.release(node.kv)
        node.kv = KVRange(0, 0)

    def _take_off(self, row: LiveRow) -> None:
        """Remove the row and its blocks from the device."""
        self.rows.remove(row)
        for block in row.blocks:
            self.cache.release(block)
        row.blocks = []
        for node in nodes_above(row):
            node.live_rows -= 1
        self.changes += 1

    def _leave(self, row: LiveRow) -> None:
        """The nodes above have one sequence less to serve."""
        for node in nodes_above(row):
            node.unfinished -= 1
            if not node.unfinished:
                self._on_release(node)
                self.cache.release(node.kv)
                del self._nodes[node.node]


def _slots(nodes: list[LiveNode]) -> int:
    return sum(node.end - node.span_start for node in nodes)


def ending_counts(plan: Plan, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of `sequences` end exactly at each node: [nodes] int64."""
    terminal = plan.tree.terminal[plan.sequences.prompt[sequences]]
    return np.bincount(terminal, minlength=plan.tree.num_nodes)


def kv_tokens_if_all_at_once(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Slots that would hold every node and row of the job at the same time: an upper bound."""
    shared = plan.count_below(sequences) > 1
    span_start = np.where(plan.is_group, plan.anchor_end, plan.tree.start)
    nodes = (plan.tree.end - span_start)[shared].sum()
    rows = plan.prompt_lengths[sequences] + plan.max_new_tokens[sequences] - 1
    return int(nodes + rows.sum())
