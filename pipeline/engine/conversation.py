"""A conversation on the device: what it keeps of its history, and where that stands.

```
 numbers    0 .. 3 | 4 ..... 99 | 100 ..... 180 | next       of the conversation's tokens
 kept       run    |  evicted   | run           |
 gap        0 .. 3               100 ..... 180    181         where they stand, keys as they are
 rerotate   96 .. 99             100 ..... 180    181         the first run by a view, 96 back
```

No key is turned when tokens go: a run that stands elsewhere than it was born is seen by queries
that are turned back by its shift, as documents are (`views`). Only distances count, so the newest
run may stand where it was born, and older ones are moved up to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.packing import PlacedSlots, SeenDocuments
from pipeline.engine.spans import Block, PlacedPiece, Placement
from pipeline.plan.conversations import Eviction
from pipeline.records import EvictionEvent

SAFE_SHARE = 0.9
"""Of the model's window: what may lie between the first kept token and the newest with "auto"."""
_SLOT_BITS = 31


class KeptRun(NamedTuple):
    """Kept tokens side by side in slots: `slots` at positions where they were born, `shift` by how
    much they stand later, `numbers` of the tokens [n] or [layers, kv_heads, n]. Tokens that were
    gathered have slots side by side, whatever their numbers."""

    slots: PlacedSlots
    shift: int
    numbers: NDArray[np.int64]
    is_shared: bool = False
    is_gathered: bool = False

    @property
    def length(self) -> int:
        return self.slots.high - self.slots.low


@dataclass(eq=False, slots=True)
class Conversation:
    """`turns`: its turns in the plan, of which `number` is the current one. It never needs more
    than `most_slots` of its own.

    `ids`: its tokens so far; the KV of the first `computed` is or was there. Of the positions
    before `own_start`, which others may see as well, the runs [low, high) of `shared` are kept;
    `blocks`: its own. `num_kept`: tokens of both. `offset`: by how much positions are less than
    numbers. `log`: all evictions; the first `num_done` of them were made on this device. `saved`:
    blocks without slots, and their KV. `begun`: how often its first prompt was computed, which has
    `first_prompt` tokens.
    """

    eviction: Eviction
    turns: range
    system: int
    most_slots: int
    first_place: Placement
    ids: list[int]
    computed: int
    turn_starts: list[int]
    blocks: list[Block] = field(default_factory=list)
    shared: list[tuple[int, int]] = field(default_factory=list)
    num_kept: int = 0
    number: int = 0
    question_end: int = 0
    offset: int = 0
    rerotates: bool = False
    key_turns: int = 0
    log: list[EvictionEvent] = field(default_factory=list)
    num_done: int = 0
    saved: list[tuple[Block, Tensor]] | None = None
    begun: int = 0
    first_prompt: int = 0

    def begin(self, prompt_end: int) -> None:
        """As it is when its first prompt has been computed; all else must be computed again."""
        self.begun, self.first_prompt = self.begun + 1, prompt_end
        self.computed = self.num_kept = prompt_end
        start, cut = self.own_start, min(self.system, self.own_start)
        self.shared = [run for run in ((0, cut), (cut, start)) if run[0] < run[1]]
        self.offset = self.key_turns = self.num_done = 0
        self.rerotates, self.saved = self.eviction.positions == "rerotate", None

    def ask(self, fed: NDArray[np.int64]) -> None:
        """The next turn's prompt, which nothing was computed of."""
        self.turn_starts.append(len(self.ids))
        self.ids += fed.tolist()
        self.question_end = len(self.ids)

    @property
    def own_start(self) -> int:
        return self.first_place.position

    @property
    def is_behind(self) -> bool:
        """Whether some of its tokens must be computed again before it goes on."""
        return self.computed < len(self.ids)

    @property
    def due(self) -> EvictionEvent | None:
        """The first eviction that is not repeated yet."""
        return self.log[self.num_done] if self.num_done < len(self.log) else None

    @property
    def is_last_turn(self) -> bool:
        return self.number + 1 == len(self.turns)

    @property
    def next_position(self) -> int:
        """Where the next token is computed."""
        return self.computed - self.offset

    @property
    def room(self) -> int:
        """Tokens that fit before some must go."""
        return self.eviction.most_tokens - self.num_kept

    @property
    def first_kept(self) -> int:
        """Number of the oldest token that is there."""
        if self.shared:
            return self.shared[0][0]
        first = self.blocks[0] if self.blocks else None
        if first is None:
            return self.computed
        return first.first if first.numbers is None else int(first.numbers.min())

    def runs(self, place: Placement) -> list[KeptRun]:
        """All that it keeps, oldest first; what it shares stands above `place`.

        Where runs are moved together, each ends where the next one begins, and the newest right
        before the next token.
        """
        runs: list[KeptRun] = []
        stands = self.next_position
        for run in reversed([*self._shared_runs(place), *self._own_runs()]):
            shift = -self.offset if run.is_shared else 0
            if self.rerotates:
                stands -= run.length
                shift = stands - run.slots.position
            runs.append(run._replace(shift=shift))
        return runs[::-1]

    def stands(self, run: KeptRun) -> NDArray[np.int64]:
        """Positions of its tokens as the next query sees them, in the shape of `numbers`."""
        if run.is_gathered and not self.rerotates:  # their keys were never turned
            return run.numbers - self.offset
        first = run.slots.position + run.shift
        return np.broadcast_to(np.arange(first, first + run.length), run.numbers.shape)

    def _shared_runs(self, place: Placement) -> Iterator[KeptRun]:
        for slots in Placement.seen_before(place, self.own_start):
            end = slots.position + slots.high - slots.low
            for low, high in self.shared:
                first, stop = max(low, slots.position), min(high, end)
                if first < stop:
                    at = slots.low + first - slots.position
                    placed = PlacedSlots(at, at + stop - first, first)
                    yield KeptRun(placed, 0, np.arange(first, stop), is_shared=True)

    def _own_runs(self) -> Iterator[KeptRun]:
        for block in self.blocks:
            stop = min(block.end, self.next_position)
            if block.position < stop:
                numbers = block.numbers_of(stop - block.position)
                is_gathered = block.numbers is not None
                placed = block.placed(block.position, stop)
                yield KeptRun(placed, 0, numbers, is_gathered=is_gathered)


@dataclass(frozen=True, eq=False, slots=True)
class TurnPlacement(Placement):
    """What a turn after the first computes, from `position` on; `span` counts its tokens alone."""

    conversation: Conversation

    def seen_runs(self) -> list[KeptRun]:
        """What queries see of what is kept, oldest first."""
        return self.conversation.runs(self)

    def seen_before(self, position: int) -> tuple[PlacedSlots, ...]:
        """What of the shared spans is kept and stands where it was born."""
        runs = self.seen_runs()
        return tuple(run.slots for run in runs if run.is_shared and not run.shift)

    @property
    def documents(self) -> SeenDocuments:
        """What stands elsewhere than it was born."""
        moved = [run for run in self.seen_runs() if run.shift]
        slots = [run.slots for run in moved]
        keys = [(s.low << _SLOT_BITS | s.high, s.position) for s in slots]
        return SeenDocuments(
            np.array(keys, np.int64).reshape(-1, 2),
            np.array([run.shift for run in moved], np.int64),
            lambda i: (slots[i],),
        )

    def pieces(self, low: int, high: int) -> Iterator[PlacedPiece]:
        above = self.seen_before(low)
        moved = {run.slots.low for run in self.seen_runs() if run.shift}
        for block in self.conversation.blocks:
            first, stop = max(low, block.position), min(high, block.end)
            if first < stop:
                past = first - block.position
                yield PlacedPiece(first, stop, first, block.slot(first), past, above)
            if block.position < min(high, block.end) and block.kv.start not in moved:
                above = (*above, block.placed(block.position, min(block.end, high)))

    def open_slot(self, blocks: list[Block]) -> int:
        return blocks[-1].kv.start

    def closed_slots(self, blocks: list[Block]) -> Iterator[PlacedSlots]:
        moved = {run.slots.low for run in self.seen_runs() if run.shift}
        for block in blocks[:-1]:
            if block.kv.length and block.kv.start not in moved:
                yield block.placed(block.position, block.end)

    def copied_slots(self) -> NDArray[np.int64]:
        """None: what is shared above is seen where it is."""
        return np.zeros(0, np.int64)
