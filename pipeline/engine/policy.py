"""Who enters the device, who gives way, and what is kept. Knows counts of slots, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.live import LiveRow
from pipeline.engine.spans import SharedSpan

REFILL_BELOW = 0.75
"""New rows enter when so few of the rows of the last admission are left: prefill stays packed."""
LIKELY_SHARE = 0.75
"""Rows are expected to reach this share of the mean answer so far: they are not all old at once."""


class DepthFirstPolicy:
    """Rows run in depth-first order of the plan, in which nothing is to be guessed.

    A shared span is kept until the last sequence below it has ended. Where there is no more room,
    the idle span that is needed last is evicted, or else the last row gives up its KV. So every
    live row comes before every waiting one, and the first is never preempted: alone it always finds
    room.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._live = 0
        self._refill_at = 0
        self._spoken_for = 0
        self._ended_rows = 0
        self._ended_tokens = 0

    def halve(self) -> None:
        """From now on half as many rows at once: memory ended with so many."""
        self._max_rows = max(1, self._max_rows // 2)

    def rows_to_admit(self, live: Sequence[LiveRow]) -> int:
        """None before few enough rows of the last admission are left."""
        if len(live) > self._refill_at:
            return 0
        self._live = len(live)
        self._spoken_for = sum(self._likely_growth(row, row.reserved_end) for row in live)
        self.closes(live)
        return max(0, self._max_rows - len(live))

    def lets_in(self, row: LiveRow, needed: int, free: int) -> bool:
        """Where the live rows and this one find room for what they will likely grow to; where
        nothing runs it needs no room but its own."""
        growth = self._likely_growth(row, row.first_block_end)
        if self._live:
            needed += growth + self._spoken_for
        return needed <= free

    def entered(self, row: LiveRow) -> None:
        """Its growth is spoken for."""
        self._live += 1
        self._spoken_for += self._likely_growth(row, row.reserved_end)

    def closes(self, live: Sequence[LiveRow]) -> None:
        """The next ones enter when some of these have ended."""
        self._refill_at = int(len(live) * REFILL_BELOW)

    def gives_way(
        self, live: Sequence[LiveRow], idle: Sequence[SharedSpan]
    ) -> LiveRow | SharedSpan:
        """The idle span that is needed last, or else the last row; after that some row must end
        first. `idle`: those that are needed later come later."""
        if idle:
            return idle[-1]
        self._refill_at = min(self._refill_at, len(live) - 2)
        return live[-1]

    def ended(self, row: LiveRow) -> None:
        """What others will grow to goes by the answers so far."""
        self._ended_rows += 1
        self._ended_tokens += len(row.token_ids)

    def is_over(self, span: SharedSpan) -> bool:
        """With the last sequence below it."""
        return not span.unfinished

    def _likely_growth(self, row: LiveRow, reserved_end: int) -> int:
        """Slots beyond `reserved_end` that the row will ask for, by the rows that have ended."""
        likely = int(LIKELY_SHARE * self._ended_tokens / max(1, self._ended_rows))
        return max(0, min(row.end + likely, row.last_position) - reserved_end)
