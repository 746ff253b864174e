"""What decoding rows look at, kept from step to step while nothing moves. Knows no tensors.

```
 row 0   span A | span B | blocks[0] | blocks[1] | blocks[2] .. slot of the new token
 row 1   span A | span B | blocks[0] .. slot of the new token
         |-------- before(): kept -------------|--- own(): one more each step
```
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.conversation import TurnPlacement
from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.live import LiveRow
from pipeline.engine.packing import DocumentSpans, document_spans, shared_spans

Seen = tuple[KVSpans, DocumentSpans | None]
"""Spans of the rows themselves, and what they see of documents."""

Slots = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(first, last + 1) of each row: [rows] int64 both."""


class DecodeView:
    """What the rows of a step see. All rows neighbours in depth-first order."""

    def __init__(self) -> None:
        self._changes = -1
        self._before: dict[tuple[int, int], Seen] = {}
        self._own: dict[tuple[int, int], NDArray[np.int64]] = {}

    def before(self, rows: list[LiveRow], changes: int) -> Seen:
        """All that lies before each row's last block; `changes` is the scheduler's count of them.

        Rows may be decoded in several parts, which the first one's sequence and the number tell.
        """
        part = self._part(rows, changes)
        if part not in self._before:
            at = [(row, row + 1) for row in range(len(rows))]
            documents = document_spans([row.place.documents for row in rows], at)
            spans = np.concatenate([_shared(rows), _earlier_blocks(rows)])
            self._before[part] = spans, documents
        return self._before[part]

    def own(self, rows: list[LiveRow], changes: int) -> tuple[NDArray[np.int64], Slots]:
        """Positions of the rows' new tokens, and the slots of each row's last block up to them.

        While nothing moves, a row's slots are its positions and a constant: then all that is asked
        of 256 rows in a step is how many tokens they have.
        """
        part = self._part(rows, changes)
        if part not in self._own:
            columns = [
                (row.end - 1, row.open_slot, row.next_slot - row.next_position) for row in rows
            ]
            self._own[part] = np.array(columns, np.int64).T
        before, low, shift = self._own[part]
        positions = before + np.array([len(row.token_ids) for row in rows], np.int64)
        return positions, (low, positions + shift + 1)

    def _part(self, rows: list[LiveRow], changes: int) -> tuple[int, int]:
        """What tells these rows from others, as long as nothing changes; forgets all that did."""
        if changes != self._changes:
            self._changes = changes
            self._before.clear()
            self._own.clear()
        return rows[0].sequence, len(rows)


def _shared(rows: list[LiveRow]) -> KVSpans:
    """Rows below the same placement see the same spans, but of those that each has kept."""
    above, bounds, low = [], [], 0
    for _, below in groupby(rows, key=_sees):
        first, *others = below
        above.append(first.place.seen_before(first.place.position))
        bounds.append((low, low + 1 + len(others)))
        low = bounds[-1][1]
    return shared_spans(above, bounds)


def _sees(row: LiveRow) -> object:
    """The same for neighbours that see the same above them."""
    place = row.place
    return place.seen_before(place.position) if isinstance(place, TurnPlacement) else place.above


def _earlier_blocks(rows: list[LiveRow]) -> KVSpans:
    spans = []
    for query, row in enumerate(rows):
        spans += [(query, query + 1, *placed) for placed in row.closed_slots()]
    return np.array(spans, np.int64).reshape(-1, 5)
