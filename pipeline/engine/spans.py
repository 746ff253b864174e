"""KV spans: which slots hold the KV of which tokens, and where a span stands in a row's frame.

A span knows slots and no positions, a placement gives it a position. So the same KV may stand at
one position in all rows, as a shared prefix does, or at another one in each, as a document does.

```
 positions   0 ....... position .. start ......... end      of a placement
 slots                 | copied    | computed here |        kv: as many, side by side, anywhere
 above       | span, span .........|
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kv_cache import KVRange
from pipeline.engine.packing import NO_DOCUMENTS, PlacedSlots, SeenDocuments
from pipeline.plan.token_table import Ids


@dataclass(eq=False, slots=True, kw_only=True)
class KVSpan:
    """The KV of `length` prompt tokens. `kv` is empty while it is not on the device.

    The first `copied` tokens are computed in the short spans before it and copied, so that decoding
    rows see one range for all of them. `storable`: as many tokens from its beginning an earlier run
    has stored, not above 0 if none; `stored_tokens`: those of its own that were loaded.
    """

    length: int
    copied: int = 0
    storable: int = 0
    stored_tokens: int = 0
    kv: KVRange = field(default_factory=lambda: KVRange(0, 0))
    prefill_s: float = 0.0

    @property
    def is_resident(self) -> bool:
        """Whether it has slots; whether they are filled already is the engine's business."""
        return self.kv.length > 0


@dataclass(eq=False, slots=True, kw_only=True)
class SharedSpan(KVSpan):
    """A span below which some sequence was admitted and some has not ended.

    `key`: what it holds, as the layout numbers it; `ids` are those of its path from position 0 on,
    `sequence` is one that sees it. Of the `num_sequences` that do `unfinished` have not ended and
    `live_rows` are on the device; `unread` end exactly with it and have not sampled their first
    token yet (`logits` [V] waits for them).
    """

    key: int
    ids: Ids
    sequence: int
    num_sequences: int
    unfinished: int
    unread: int
    live_rows: int = 0
    was_computed: bool = False
    logits: Tensor | None = None


@dataclass(eq=False, slots=True)
class Block:
    """Slots of one row for consecutive positions from `position` on.

    Of a conversation: `first` is the number of its first token, counted from the conversation's
    first; where other tokens were gathered here, `numbers` [n] or [layers, kv_heads, n] are theirs.
    """

    kv: KVRange
    position: int
    first: int = 0
    numbers: NDArray[np.int64] | None = None

    @property
    def end(self) -> int:
        """The position after the last one that has a slot."""
        return self.position + self.kv.length

    def slot(self, position: int) -> int:
        return self.kv.start + position - self.position

    def placed(self, low: int, high: int) -> PlacedSlots:
        """Of the positions `[low, high)`."""
        return PlacedSlots(self.slot(low), self.slot(high), low)

    def numbers_of(self, count: int) -> NDArray[np.int64]:
        """Of its first `count` tokens, as `numbers`."""
        if self.numbers is not None:
            return self.numbers
        return np.arange(self.first, self.first + count)


@dataclass(frozen=True, eq=False, slots=True)
class Placement:
    """A span in a row's frame, its first token at `position`; `above`: the shared one before it.

    `position`, `start` and `end` are positions. Only `slots` leads from positions to slots.
    """

    span: KVSpan
    position: int
    above: SharedPlacement | None

    @property
    def start(self) -> int:
        """Where the tokens begin that are computed in this span."""
        return self.position + self.span.copied

    @property
    def end(self) -> int:
        """The position after its last prompt token."""
        return self.position + self.span.length

    @property
    def needs(self) -> list[SharedPlacement]:
        """The shared spans that must be there before it is computed, parents first."""
        return [*self.all_above()][::-1]

    @property
    def documents(self) -> SeenDocuments:
        """What its tokens see in other frames."""
        return NO_DOCUMENTS

    @property
    def stored_end(self) -> int:
        """Up to where the KV of an earlier run can be loaded."""
        return self.position + self.span.storable

    def slots(self, low: int, high: int) -> slice:
        """Of the arena, for positions `[low, high)`."""
        first = self.span.kv.start - self.position
        return slice(first + low, first + high)

    def all_above(self) -> Iterator[SharedPlacement]:
        """From the nearest one to the top."""
        placement = self.above
        while placement is not None:
            yield placement
            placement = placement.above

    def whole(self) -> tuple[PlacedSlots, ...]:
        """What covers all positions up to its end, top first."""
        own = PlacedSlots(self.span.kv.start, self.span.kv.stop, self.position)
        return (*self.seen_before(self.position), own)

    def seen_before(self, position: int) -> tuple[PlacedSlots, ...]:
        """What covers all positions before `position`, top first.

        In prefill that is where the tokens begin that are computed here; a decoding row asks for
        all before its own span. A span with copies covers the short ones above it.
        """
        seen: list[PlacedSlots] = []
        for shared in self.all_above():
            if shared.end == position:
                kv = shared.span.kv
                seen.append(PlacedSlots(kv.start, kv.stop, shared.position))
                position = shared.position
        return tuple(reversed(seen))

    def pieces(self, low: int, high: int) -> Iterator[PlacedPiece]:
        """Positions `[low, high)`, cut where its tokens are not neighbours in the row."""
        seen = self.seen_before(self.start)
        yield PlacedPiece(low, high, low, self.slots(low, high).start, low - self.start, seen)

    @property
    def last_run(self) -> int:
        """Position from which on its tokens are neighbours in the row."""
        return self.position

    def open_slot(self, blocks: list[Block]) -> int:
        """Of a row with these blocks: the first slot of those that are the last in a row."""
        first = blocks[0].slot(self.last_run)
        return first if len(blocks) == 1 else blocks[-1].kv.start

    def closed_slots(self, blocks: list[Block]) -> Iterator[PlacedSlots]:
        """What of a row's own lies before `open_slot`."""
        low = self.last_run
        for block in blocks[:-1]:
            yield block.placed(low, block.end)
            low = block.end

    def copied_slots(self) -> NDArray[np.int64]:
        """Where the KV of the first `copied` tokens was computed."""
        slots = [np.zeros(0, np.int64)]
        for shared in self.all_above():
            if shared.end <= self.position:
                break
            slots.append(np.arange(shared.span.kv.start, shared.span.kv.stop))
        return np.concatenate(slots[::-1])


@dataclass(frozen=True, eq=False, slots=True)
class SharedPlacement(Placement):
    """A shared span in the frame of the rows below it, or in that of its document."""

    span: SharedSpan


class PlacedPiece(NamedTuple):
    """Positions `[low, high)` of a placement, which in the row begin at `position` and lie from
    `slot` on; `past` of its tokens stand right before, and `above` holds what else is seen in the
    row's frame."""

    low: int
    high: int
    position: int
    slot: int
    past: int
    above: tuple[PlacedSlots, ...]


def slots_from(last: SharedPlacement, first: int) -> tuple[PlacedSlots, ...]:
    """From position `first` on to the end of `last`, top first."""
    slots: list[PlacedSlots] = []
    part: SharedPlacement | None = last
    while part is not None and part.end > first:
        low = max(first, part.position)
        placed = part.slots(low, part.end)
        slots.append(PlacedSlots(placed.start, placed.stop, low))
        part = part.above
    return tuple(reversed(slots))
