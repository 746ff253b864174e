"""Conversations that gave up their place on the device: their KV waits in memory of the host, or is
computed again turn by turn, with the same evictions, where that is cheaper or there is no room.
"""

from __future__ import annotations

from pipeline.engine.conversation import Conversation, TurnPlacement
from pipeline.engine.counters import EngineCounters
from pipeline.engine.kept_kv import KeptKV, saved_bytes
from pipeline.engine.live import LiveRow
from pipeline.engine.spill_cost import SpillCost


class HostStates:
    """At most `budget` bytes of them; None: any number. `cost` None: saving is always cheaper."""

    def __init__(
        self, kept: KeptKV, budget: int | None, cost: SpillCost | None, counters: EngineCounters
    ) -> None:
        self._kept = kept
        self._budget = budget
        self._cost = cost
        self._counters = counters
        self._used = 0

    def save(self, row: LiveRow) -> None:
        """A live row is about to give up its blocks. Rows in their first prompt's answer are
        computed again in one pass, as rows of other jobs are."""
        conversation = row.conversation
        if conversation is None or not isinstance(row.place, TurnPlacement):
            return
        size = self._kept.size(conversation)
        has_room = self._budget is None or self._used + size <= self._budget
        if not has_room or self._is_cheaper_again(conversation, size):
            self._counters.repeated_conversations += 1
            _begin_again(row, conversation)
            return
        self._kept.save(conversation)
        self._used += size
        self._counters.saved_conversations += 1

    def restore(self, row: LiveRow) -> None:
        """Its KV comes back; there is room for it."""
        assert row.conversation is not None
        self._used -= saved_bytes(row.conversation)
        self._kept.restore(row.conversation)

    def _is_cheaper_again(self, conversation: Conversation, size: int) -> bool:
        """To compute all that it has said again takes less time than to save and load `size`."""
        if self._cost is None:
            return False
        start = conversation.first_place.start
        forwards = 1
        if conversation.eviction.evictor != "none":  # it goes from turn to turn, and stops for each
            forwards = len(conversation.turn_starts) + len(conversation.log)
        again = self._cost.compute_s(conversation.computed - start, start, forwards)
        return again < self._cost.save_s(size)


def _begin_again(row: LiveRow, conversation: Conversation) -> None:
    row.place = conversation.first_place
    conversation.begin(row.place.start + len(row.ids))
