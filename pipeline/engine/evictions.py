"""When tokens of a conversation must go, which, and where the others stand from then on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.conversation import SAFE_SHARE, Conversation, TurnPlacement
from pipeline.engine.eviction import Held, choose, key_of, mask_of, runs_of
from pipeline.engine.kept_kv import KeptKV
from pipeline.engine.live import LiveRow
from pipeline.engine.observation import mass_kept, newest, window
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.watching import Watcher, conversation_of, joined
from pipeline.plan.conversations import BY_HEAD, Eviction
from pipeline.records import EvictionEvent

REBASE_AT = 1 << 16
"""Positions up to here are small enough for a rotary module that computes angles in float32."""


class Evictions:
    """Those of one run of the engine."""

    def __init__(
        self, eviction: Eviction, scheduler: Scheduler, kept: KeptKV, watcher: Watcher
    ) -> None:
        self._eviction = eviction
        self._scheduler = scheduler
        self._kept = kept
        self._watcher = watcher

    def make_room(self, rows: Iterable[LiveRow]) -> None:
        """Before they decode: of rows that are full some tokens go, and where kept tokens stand too
        far apart they are moved together."""
        if self._eviction.evictor == "none":
            return
        for row in rows:
            conversation = conversation_of(row)
            if self._scheduler.has_place(row) and conversation.room < 1:
                keep = int(self._eviction.evict_to * self._eviction.budget_tokens)
                self._evict(row, conversation, keep)
            if self._scheduler.has_place(row):
                self._lay_together(row, conversation, 1)

    def prepare(self, row: LiveRow, fed: int, new_tokens: int) -> None:
        """Before a turn that feeds `fed` tokens and may answer with `new_tokens`.

        What is gathered may need slots, as in all of these; the row may lose its place for want of
        them, and then does it again.
        """
        conversation = conversation_of(row)
        self._make_room_for(row, conversation, fed, new_tokens)
        if not self._scheduler.has_place(row):
            return
        self._rebase(row, conversation)
        self._lay_together(row, conversation, fed + new_tokens)

    def repeat(self, row: LiveRow, coming: int) -> int:
        """What was done at this point before, where `coming` tokens were expected. The number of
        the token before which the next of it was done, or all of them."""
        conversation = conversation_of(row)
        while event := conversation.due:
            if event.at > conversation.computed:
                break
            self._evict(row, conversation, 0, event)
            if not self._scheduler.has_place(row):
                return conversation.computed
        if not conversation.is_behind:
            return conversation.computed
        self._rebase(row, conversation)
        self._lay_together(row, conversation, coming)
        stop = len(conversation.ids) if event is None else event.at
        if not self._may_lie_too_far(conversation):
            return stop
        return min(stop, conversation.first_kept + int(SAFE_SHARE * self._eviction.window))

    def _make_room_for(
        self, row: LiveRow, conversation: Conversation, fed: int, new_tokens: int
    ) -> None:
        eviction = self._eviction
        if eviction.evictor == "none" or fed + new_tokens <= conversation.room:
            return
        budget = eviction.budget_tokens
        keep = min(int(eviction.evict_to * budget), budget - fed - new_tokens)
        stays = 0 if eviction.evictor == "window" else conversation.system
        self._evict(row, conversation, max(keep, stays))
        if self._scheduler.has_place(row) and fed + 1 > conversation.room:
            # a long answer waits for what it needs, a prompt must fit at once
            self._evict(row, conversation, max(budget - fed - 1, stays))

    def _rebase(self, row: LiveRow, conversation: Conversation) -> None:
        if self._eviction.evictor != "none" and conversation.next_position > REBASE_AT:
            self._watcher.count(row)
            self._kept.rebase(conversation, row.place)
            self._watcher.of(row).recent.clear()

    def _evict(
        self,
        row: LiveRow,
        conversation: Conversation,
        keep: int,
        event: EvictionEvent | None = None,
    ) -> None:
        """Down to `keep` tokens, or what an `event` of the past says."""
        is_new = event is None  # else it was noted when it was made
        if is_new and conversation.num_kept <= keep:
            return
        if not isinstance(row.place, TurnPlacement):
            first = row.place
            row.place = TurnPlacement(first.span, first.position, first.above, conversation)
        self._watcher.count(row)
        runs = conversation.runs(row.place)
        numbers, bounds = joined(conversation, runs)
        if self._eviction.evictor in BY_HEAD:
            layers, _, heads = self._kept.arena.shape[:3]
            numbers = np.broadcast_to(numbers, (layers, heads, numbers.shape[-1]))
        watch = self._watcher.of(row)
        mass = 1.0
        if event is None:
            self._watcher.measure(row)
            weights = self._watcher.weights(row, runs)
            mask = self._choose(row, numbers, keep, weights)
            if mask.all():
                return
            if weights is not None:
                mass = mass_kept(weights, mask)
            kept = numbers[mask].reshape(*numbers.shape[:-1], -1)
            event = EvictionEvent(conversation.computed, runs_of(kept))
        else:
            mask = mask_of(event, numbers)
        masks = np.split(mask, bounds[1:-1], axis=-1)
        if not self._scheduler.clear(row, self._kept.more_slots(conversation, runs, masks)):
            return
        if is_new:
            conversation.log.append(event)
        conversation.num_done += 1
        self._kept.keep(conversation, runs, masks)
        if watch.sums is not None:
            watch.sums.keep(mask)
        self._scheduler.changes += 1
        if is_new:
            watch.health.evicted(event, mass)
            self._watcher.measure(row)

    def _choose(
        self, row: LiveRow, numbers: NDArray[np.int64], keep: int, weights: Tensor | None
    ) -> NDArray[np.bool_]:
        conversation, by = conversation_of(row), self._eviction.evictor
        of_keys = None
        if by == "h2o":
            sums = self._watcher.of(row).sums
            assert sums is not None
            of_keys = sums.means(numbers.shape[-1])
        elif weights is not None and by == "snapkv":
            of_keys = window(weights)
        elif weights is not None and by == "attention-top":
            of_keys = newest(weights)
        is_asked = conversation.number + 1 == len(conversation.turn_starts) and not row.is_waiting
        end = len(conversation.ids)
        held = Held(
            index=numbers,
            turn_starts=np.array(conversation.turn_starts),
            system=conversation.system,
            question=conversation.turn_starts[-1] if is_asked else end,
            question_end=conversation.question_end if is_asked else end,
            weights=of_keys,
        )
        key = key_of(conversation.ids[: conversation.first_prompt])
        return choose(self._eviction, held, keep, key)

    def _lay_together(self, row: LiveRow, conversation: Conversation, coming: int) -> None:
        """Where so many tokens more would lie too far from the first one that is kept."""
        reach = conversation.computed + coming - conversation.first_kept
        far = SAFE_SHARE * self._eviction.window
        if self._may_lie_too_far(conversation) and reach > far:
            self._watcher.count(row)
            self._kept.lay_together(conversation)
            self._scheduler.changes += 1

    def _may_lie_too_far(self, conversation: Conversation) -> bool:
        is_auto = self._eviction.evictor != "none" and self._eviction.positions == "auto"
        return is_auto and not conversation.rerotates
