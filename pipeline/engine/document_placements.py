"""Placements of rows that see documents: their own tokens among these, or a copy of all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.layout import OwnRun
from pipeline.engine.packing import PlacedSlots, SeenDocuments
from pipeline.engine.spans import Block, PlacedPiece, Placement, SharedPlacement


@dataclass(frozen=True, eq=False, slots=True)
class DocumentPlacement(Placement):
    """Of a row with documents: what it sees of them, and all spans that it needs, parents first."""

    seen: SeenDocuments
    all_needs: tuple[SharedPlacement, ...]

    @property
    def needs(self) -> list[SharedPlacement]:
        return [*self.all_needs]

    def seen_before(self, position: int) -> tuple[PlacedSlots, ...]:
        """All that is above it in the row's own frame, whatever stands between."""
        return () if self.above is None else self.above.whole()


@dataclass(frozen=True, eq=False, slots=True)
class ScatteredPlacement(DocumentPlacement):
    """A row's own tokens between documents. What stands before the last run is placed by `runs`;
    to all of them slots are given as if they lay side by side, so that `position` is not theirs."""

    runs: tuple[OwnRun, ...]

    @property
    def documents(self) -> SeenDocuments:
        return self.seen

    @property
    def last_run(self) -> int:
        return self.position + sum(run.length for run in self.runs)

    def pieces(self, low: int, high: int) -> Iterator[PlacedPiece]:
        seen = self.seen_before(low)
        for run in self.runs:
            first = self.position + run.offset
            start, stop = max(low, first), min(high, first + run.length)
            if start < stop:
                past, slot = start - first, self.slots(start, stop).start
                yield PlacedPiece(start, stop, run.position + past, slot, past, seen)
            seen = (*seen, self._placed(run))
        start = max(low, self.last_run)
        if start < high:
            slot = self.slots(start, high).start
            yield PlacedPiece(start, high, start, slot, start - self.last_run, seen)

    def closed_slots(self, blocks: list[Block]) -> Iterator[PlacedSlots]:
        yield from map(self._placed, self.runs)
        yield from super(ScatteredPlacement, self).closed_slots(blocks)

    def _placed(self, run: OwnRun) -> PlacedSlots:
        slots = self.slots(self.position + run.offset, self.position + run.offset + run.length)
        return PlacedSlots(slots.start, slots.stop, run.position)


@dataclass(frozen=True, eq=False, slots=True)
class AssembledPlacement(DocumentPlacement):
    """A row that holds a copy of all that it sees of documents, at its own positions. Of these it
    computes again those of `again`, before its question; `start` counts back from its end over
    all that it computes, as if that lay side by side."""

    again: NDArray[np.int64]

    def copied_slots(self) -> NDArray[np.int64]:
        """None: its documents' keys are turned while they are copied, see `copies`."""
        return np.zeros(0, np.int64)

    def copies(self) -> Iterator[tuple[slice, slice, int]]:
        """(slots of a document, those of this row, by how much keys are turned)."""
        for number, shift in enumerate(self.seen.shifts.tolist()):
            for low, high, position in self.seen.slots(number):
                at = position + shift
                yield slice(low, high), self.slots(at, at + high - low), shift

    def pieces(self, low: int, high: int) -> Iterator[PlacedPiece]:
        seen = self.seen_before(low)
        computed = np.arange(low, high)
        is_again = computed < self.start + len(self.again)
        computed[is_again] = self.again[computed[is_again] - self.start]
        edges = np.flatnonzero(np.diff(computed) != 1) + 1
        for first, stop in zip([0, *edges], [*edges, len(computed)], strict=True):
            at = int(computed[first])
            slot = self.slots(at, at + 1).start
            yield PlacedPiece(low + int(first), low + int(stop), at, slot, at - self.position, seen)
