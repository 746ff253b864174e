"""Forced tokens of rows on the device: one packed forward instead of a decode step for each.

```
 token_ids   .. chosen, forced, forced, forced
 positions        p      p+1     p+2     p+3         fed together; the logits at p+3 choose the next
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.packing import SeenDocuments
from pipeline.engine.scheduler import BLOCK_TOKENS, Scheduler
from pipeline.engine.spans import KVSpan, PlacedPiece, Placement

BEGIN_ABOVE = 0.25
"""They are fed together, when so many of the live rows have some: a forward costs the model's
weights, however few its tokens are."""


@dataclass(frozen=True, eq=False, slots=True)
class RunPlacement(Placement):
    """The end of a row's answer, which lies in its blocks."""

    row: LiveRow

    @property
    def documents(self) -> SeenDocuments:
        return self.row.place.documents

    def pieces(self, low: int, high: int) -> Iterator[PlacedPiece]:
        """Cut where a block ends; each sees what a decoding row sees."""
        place, blocks = self.row.place, self.row.blocks
        seen = place.seen_before(place.position)
        for count, block in enumerate(blocks, 1):
            start, stop = max(low, block.position), min(high, block.end)
            if start < stop:
                upto, slot = blocks[:count], block.slot(start)
                above = (*seen, *place.closed_slots(upto))
                past = slot - place.open_slot(upto)
                yield PlacedPiece(start, stop, start, slot, past, above)


def take_runs(scheduler: Scheduler) -> list[PrefillJob]:
    """Of all rows with forced tokens that wait, once these are enough rows, or no other row is
    left; a row that finds no slots gives up its place."""
    rows = scheduler.rows
    waiting = [row for row in rows if row.run]
    if len(waiting) < len(rows) and len(waiting) < BEGIN_ABOVE * len(rows):
        return []
    jobs = []
    for row in waiting:
        if scheduler.has_place(row) and _has_slots(scheduler, row):
            jobs.append(_job(row))
    return jobs


def _has_slots(scheduler: Scheduler, row: LiveRow) -> bool:
    begin, end = row.reserved_end, row.next_position + (row.over is None)
    if end <= begin:
        return True
    return scheduler.lengthen(row, begin, min(max(end, begin + BLOCK_TOKENS), row.last_position))


def _job(row: LiveRow) -> PrefillJob:
    last = len(row.token_ids) - (row.over is not None)  # nothing follows, so it is not fed
    ids = np.array(row.token_ids[-row.run - 1 : last], np.int64)
    first = row.next_position - row.run
    place = RunPlacement(KVSpan(length=len(ids)), first, row.place.above, row)
    return PrefillJob(row, ids, first, is_repeat=False, run=place)
