"""KV spans: which slots hold the KV of which tokens, and where a span stands in a row's frame.

A span knows slots and no positions, a placement gives it a position. So the same KV may stand at
one position in all rows, as a shared prefix does, or at another one in each.

```
 positions   0 ....... position .. start ......... end      of a placement
 slots                 | copied    | computed here |        kv: as many, side by side, anywhere
 above       | span, span .........|
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kv_cache import KVRange
from pipeline.engine.packing import PlacedSlots


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

    `key`: what it holds, as the layout numbers it. Of the `num_sequences` that see it `unfinished`
    have not ended and `live_rows` are on the device; `unread` end exactly with it and have not
    sampled their first token yet (`logits` [V] waits for them).
    """

    key: int
    num_sequences: int
    unfinished: int
    unread: int
    live_rows: int = 0
    was_computed: bool = False
    logits: Tensor | None = None


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
    """A shared span in the frame of the rows below it."""

    span: SharedSpan
