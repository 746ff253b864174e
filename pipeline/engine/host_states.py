"""Conversations that gave up their place on the device: their KV waits in memory of the host.

What was evicted once cannot be computed again in one pass, so the KV is kept; where there is no
room for it, the conversation is computed again turn by turn, with the same evictions.
"""

from __future__ import annotations

from pipeline.engine.conversation import Conversation, TurnPlacement
from pipeline.engine.kept_kv import KeptKV, saved_bytes
from pipeline.engine.live import LiveRow


class HostStates:
    """At most `budget` bytes of them; None: any number."""

    def __init__(self, kept: KeptKV, budget: int | None) -> None:
        self.num_saved = 0
        self._kept = kept
        self._budget = budget
        self._used = 0

    def save(self, row: LiveRow) -> None:
        """A live row is about to give up its blocks. Rows in their first prompt's answer are
        computed again in one pass, as rows of other jobs are."""
        conversation = row.conversation
        if conversation is None or not isinstance(row.place, TurnPlacement):
            return
        size = self._kept.size(conversation)
        if self._budget is not None and self._used + size > self._budget:
            _begin_again(row, conversation)
            return
        self._kept.save(conversation)
        self._used += size
        self.num_saved += 1

    def restore(self, row: LiveRow) -> None:
        """Its KV comes back; there is room for it."""
        assert row.conversation is not None
        self._used -= saved_bytes(row.conversation)
        self._kept.restore(row.conversation)


def _begin_again(row: LiveRow, conversation: Conversation) -> None:
    row.place = conversation.first_place
    conversation.begin(row.place.start + len(row.ids))
