"""What decoding rows look at, kept from step to step while nothing moves. Knows no tensors.

```
 row 0   node A | node B | blocks[0] | blocks[1] | blocks[2] .. slot of the new token
 row 1   node A | node B | blocks[0] .. slot of the new token
         |-------- before(): kept -------------|--- own(): one token longer each step
```
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.kernels.rules import Segments
from pipeline.engine.live import LiveRow, spans_before
from pipeline.engine.packing import shared_segments


class DecodeView:
    """Segments of the rows of a step. All rows neighbours in depth-first order."""

    def __init__(self) -> None:
        self._changes = -1
        self._before: dict[tuple[int, int], Segments] = {}

    def before(self, rows: list[LiveRow], changes: int) -> Segments:
        """All that lies before each row's last block; `changes` is the scheduler's count of them.

        Rows may be decoded in several parts, which the first one's sequence and the number tell.
        """
        if changes != self._changes:
            self._changes = changes
            self._before.clear()
        part = rows[0].sequence, len(rows)
        if part not in self._before:
            self._before[part] = np.concatenate([_shared(rows), _earlier_blocks(rows)])
        return self._before[part]


def own_slots(rows: list[LiveRow]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, last slot + 1) of each row's last block up to its new token: [rows] int64 both."""
    low = np.array([row.blocks[-1].start for row in rows], np.int64)
    length = np.array(
        [row.next_position + 1 - (row.kv_end - row.blocks[-1].length) for row in rows], np.int64
    )
    return low, low + length


def _shared(rows: list[LiveRow]) -> Segments:
    """Rows below the same node see the same ranges above."""
    spans, bounds, low = [], [], 0
    for _, below in groupby(rows, key=attrgetter("above")):
        first, *others = below
        spans.append(spans_before(first, first.span_start))
        bounds.append((low, low + 1 + len(others)))
        low = bounds[-1][1]
    return shared_segments(spans, bounds)


def _earlier_blocks(rows: list[LiveRow]) -> Segments:
    segments = []
    for place, row in enumerate(rows):
        position = row.span_start
        for block in row.blocks[:-1]:
            segments.append((place, place + 1, block.start, block.start + block.length, position))
            position += block.length
    return np.array(segments, np.int64).reshape(-1, 5)
