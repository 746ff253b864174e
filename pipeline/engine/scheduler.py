"""Which sequences are on the device, and the order of prefill. Knows no tensors but the cache's.

Sequences enter in the order of the layout and leave when they end. A shared span's range is
reserved with the first row below it; who enters, who gives way and how long a span stays is asked
of a policy (ARCHITECTURE.md).

Rows are admitted with room for a few new tokens and get more as they grow. A row that must give up
its KV waits again, first in the queue, with what it has generated; the KV is computed again when it
comes back. Only sequences that fit the whole budget to their end are admitted at all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pipeline.engine.arrivals import Arrivals, History
from pipeline.engine.host_states import HostStates
from pipeline.engine.layout import Layout
from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.policy import DepthFirstPolicy
from pipeline.engine.residency import Residency, slots_of
from pipeline.engine.spans import Block, SharedPlacement, SharedSpan
from pipeline.plan.plan import Plan

BLOCK_TOKENS = 64
"""Slots of a later block."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What `admit` decided: jobs, parents first; rows that need no forward; rows too large."""

    jobs: list[PrefillJob] = field(default_factory=list)
    ready: list[LiveRow] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


class Scheduler:
    """Admission, growth, preemption and release."""

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        residency: Residency,
        policy: DepthFirstPolicy,
        history: History,
        states: HostStates | None = None,
    ) -> None:
        """`layout`: of the sequences that shall run; `states`: of conversations that give way."""
        self.rows: list[LiveRow] = []
        self.waiting: deque[int] = deque(layout.order.tolist())
        self.changes = 0
        """Grows whenever a live row comes, goes, or gets a block, or a range moves."""
        self._layout = layout
        self._arrivals = Arrivals(plan, layout, residency, history)
        self._residency = residency
        self._policy = policy
        self._history = history
        self._preempted: dict[int, LiveRow] = {}
        self._states = states

    @property
    def has_begun(self) -> bool:
        """Whether some row has tokens and has not ended, be it live or preempted."""
        return bool(self.rows or self._preempted)

    def admit(self, now_s: float, *, only_begun: bool = False) -> Admission:
        """Let waiting sequences in while room lasts; with `only_begun` the preempted ones alone."""
        admission, cache = Admission(), self._residency.cache
        room = self._policy.rows_to_admit(self.rows)
        if not room:
            return admission
        while room and self.waiting and (self.waiting[0] in self._preempted or not only_begun):
            sequence = self.waiting[0]
            row = self._preempted.get(sequence) or self._arrivals.row(sequence, now_s)
            needs = row.place.needs
            spans = [placement.span for placement in needs]
            if slots_of(spans) + row.most_slots > cache.capacity:
                admission.refused.append(self.waiting.popleft())
                self._leave(row)
                continue
            absent = slots_of([span for span in spans if not span.is_resident])
            needed = absent + row.slots_to_enter
            if not self._make_room_for(row, needed):
                break
            self._admit_one(row, needs, admission)
            self._policy.entered(row)
            room -= 1
        self._policy.closes(self.rows)
        return admission

    def decoding(self) -> list[LiveRow]:
        """Live rows but conversations between two turns, and those whose forced tokens wait."""
        return [row for row in self.rows if not (row.is_waiting or row.run)]

    def not_begun(self) -> list[int]:
        """Sequences that were never admitted, in order."""
        return list(self.waiting)[len(self._preempted) :]

    def forget(self, count: int) -> None:
        """Drop the last `count` of those that have not begun."""
        for _ in range(count):
            sequence = self.waiting.pop()
            self._history.forgotten.add(sequence)
            self._leave(self._arrivals.row(sequence, 0.0))
        self.changes += 1  # a span that nobody needs any more has given back its range

    def grow(self, ahead: int = 1) -> int:
        """Give every live row a slot for its next token; others make room where it ends. Where room
        is left then, for its next `ahead` tokens: returns for how many of them all rows have it."""
        short = []
        for row in list(self.rows):
            if row.is_waiting or row.run or row.has_slots(ahead):
                continue
            while row.next_position >= row.reserved_end and self.has_place(row):
                if not self._extend(row):
                    self._make_room()
            short.append(row)
        return self._look_ahead([row for row in short if self.has_place(row)], ahead)

    def lengthen(self, row: LiveRow, begin: int, end: int) -> bool:
        """Give a live row slots for positions `[begin, end)`, which follow its last ones or begin
        anew; others make room. False where it had to give up its own."""
        if not self.clear(row, end - begin):
            return False
        self._add_slots(row, begin, end - begin)
        return True

    def clear(self, row: LiveRow, count: int) -> bool:
        """Others make room until `count` slots are free. False where `row` itself had to."""
        while self.has_place(row) and count > self._residency.cache.free_tokens:
            self._make_room()
        return self.has_place(row)

    def has_place(self, row: LiveRow) -> bool:
        """Whether a row that was admitted is on the device still."""
        return row.sequence not in self._preempted

    def finish(self, row: LiveRow) -> None:
        """Release the row's blocks, and every shared range that nobody needs any more."""
        row.has_ended = True
        self._policy.ended(row)
        self._take_off(row)
        self._leave(row)

    def evict_idle(self) -> None:
        """Release the ranges of spans without live rows; they are computed again when needed."""
        for span in self._residency.idle():
            self._residency.evict(span)

    def note_computed(self, span: SharedSpan) -> None:
        """All of the span's KV is there; if it must be computed once more, that is a repeat."""
        span.was_computed = True
        self._history.spans.add(span.key)

    def rows_below(self, target: SharedPlacement | LiveRow) -> list[LiveRow]:
        """Live rows that need `target`: the row itself, or all that see the span."""
        if isinstance(target, LiveRow):
            return [] if target.has_ended else [target]
        return [row for row in self.rows if target in row.place.needs]

    def _admit_one(self, row: LiveRow, needs: list[SharedPlacement], admission: Admission) -> None:
        """Reserve what is missing above the row, parents first, and its own first block."""
        jobs = []
        for shared in needs:
            span = shared.span
            span.live_rows += 1
            if not span.is_resident:
                span.kv = self._residency.reserve(span.length, from_left=True)
                own = span.ids[shared.start : shared.end].astype(np.int64)
                jobs.append(self._arrivals.job(shared, own, span.was_computed, row.sequence))
        self._preempted.pop(row.sequence, None)
        conversation, known = row.conversation, self._history.cached_tokens
        if conversation is not None and conversation.saved is not None:
            assert self._states is not None
            self._states.restore(row)
            admission.jobs.extend(jobs)
            self._enter(row)
            return
        place, length = row.place, row.first_block_end - row.place.position
        place.span.kv = self._residency.reserve(
            length, from_left=False, reach=max(length, row.last_position - place.position)
        )
        row.blocks.append(Block(place.span.kv, place.position, place.position))
        own = row.known_ids()
        if len(own):
            jobs.append(self._arrivals.job(row, own, row.sequence in known, row.sequence))
        else:
            admission.ready.append(row)
        if row.sequence not in known:
            first = sum(job.end - job.done for job in jobs if not job.is_repeat)
            known[row.sequence] = row.end + row.repaired - first
        row.cached_tokens = known[row.sequence]
        admission.jobs.extend(jobs)
        self._enter(row)

    def _enter(self, row: LiveRow) -> None:
        self.rows.append(row)
        self.waiting.popleft()
        self.changes += 1

    def _extend(self, row: LiveRow) -> bool:
        """Lengthen the row's last block, or add one; False where too few slots are free."""
        begin = max(row.reserved_end, row.next_position)
        length = min(BLOCK_TOKENS, row.last_position - begin)
        if length > self._residency.cache.free_tokens:
            return False
        self._add_slots(row, begin, length)
        return True

    def _look_ahead(self, rows: list[LiveRow], ahead: int) -> int:
        """Lengthen the last blocks of rows, where the slots behind them are free: steps that are
        planned together cannot go from one block to another. See `grow`."""
        extend, steps = self._residency.cache.extend, ahead
        for row in rows:
            end, last = row.reserved_end, row.last_position
            missing = min(row.next_position + ahead, last) - end
            if missing <= 0:
                continue
            kv = row.blocks[-1].kv
            if not extend(kv, min(max(BLOCK_TOKENS, missing), last - end)):
                extend(kv, missing)
            if row.reserved_end < end + missing:
                steps = min(steps, end - row.next_position)
        return steps

    def _add_slots(self, row: LiveRow, begin: int, length: int) -> None:
        """For positions from `begin` on: right after the last ones where they go on and those slots
        are free, or as a new block."""
        number = begin + row.offset
        last = row.blocks[-1] if row.blocks else None
        if last is not None and last.numbers is None:
            follows = (last.end, last.first + last.kv.length) == (begin, number)
            if follows and self._residency.cache.extend(last.kv, length):
                return
        reach = max(length, row.last_position - begin)
        kv = self._residency.reserve(length, from_left=False, reach=reach)
        row.blocks.append(Block(kv, begin, number))
        self.changes += 1

    def _make_room_for(self, row: LiveRow, needed: int) -> bool:
        """Whether `needed` slots are there, idle spans of others having given way; only after that
        rows have to wait."""
        cache = self._residency.cache
        if self._policy.lets_in(row, needed, cache.free_tokens):
            return True
        spared = {shared.span for shared in row.place.needs}
        for span in reversed([span for span in self._idle() if span not in spared]):
            self._residency.evict(span)
            if self._policy.lets_in(row, needed, cache.free_tokens):
                return True
        return False

    def _idle(self) -> list[SharedSpan]:
        """Resident spans without live rows; those that are needed later come later."""
        head = self.waiting[0] if self.waiting else 0
        idle = self._residency.idle()
        return sorted(idle, key=lambda span: self._layout.next_use(span.key, head))

    def _make_room(self) -> None:
        """Let give way what the policy says; a row that does waits first in the queue."""
        victim = self._policy.gives_way(self.rows, self._idle())
        if isinstance(victim, SharedSpan):
            self._residency.evict(victim)
            return
        if self._states is not None:
            self._states.save(victim)
        self._take_off(victim)
        victim.run = 0  # what waits is computed with all else when it comes back
        self._preempted[victim.sequence] = victim
        self.waiting.appendleft(victim.sequence)

    def _take_off(self, row: LiveRow) -> None:
        """Remove the row and its blocks from the device."""
        self.rows.remove(row)
        for block in row.blocks:
            self._residency.free(block.kv)
        row.blocks.clear()
        for shared in row.place.needs:
            shared.span.live_rows -= 1
        self.changes += 1

    def _leave(self, row: LiveRow) -> None:
        """The spans above have one sequence less to serve."""
        for shared in row.place.needs[::-1]:
            shared.span.unfinished -= 1
            if self._policy.is_over(shared.span):
                self._residency.forget(shared.span)
