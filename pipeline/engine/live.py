"""Rows on the device, and what waits for a prefill. Knows no model and no policy.

A shared span's KV is one range. A row's is a list of blocks, since most rows end long before
`max_new_tokens`: the first holds its prompt and the first new tokens, later ones are added as the
answer grows.

```
 positions  place.position .. place.start .. end ................... last_position
            | copied          | own prompt   | new tokens
            |---------------- blocks[0] --------------|-- blocks[1] --|
                                                                reserved_end
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.conversation import Conversation
from pipeline.engine.guides import Guide
from pipeline.engine.packing import PlacedSlots
from pipeline.engine.request_logits import TokenCounts
from pipeline.engine.spans import Block, Placement, SharedPlacement
from pipeline.plan.token_table import Ids
from pipeline.records import FinishReason, SamplingParams, TokenLogprobs

FIRST_NEW_TOKENS = 32
"""New tokens that a row's first block has room for."""


@dataclass(eq=False, slots=True)
class LiveRow:
    """A sequence that was admitted and has not ended. It has no blocks while it is preempted.

    `place`: the tokens that no other sequence shares, `ids` of its prompt from `place.start` on;
    `end`: the prompt's; `repaired`: own tokens that documents hold as well. The blocks have slots
    for the positions `[place.position, reserved_end)`; the first one is that of `place.span`.
    Of a conversation all of this is its current turn's, but the blocks, which hold what is kept;
    `is_waiting`: that turn has been answered, and the next one has not begun; `num_answered`:
    tokens of earlier answers.

    `guide`: what its answer may say next, where not everything. The last `run` of `token_ids` had
    to follow what was chosen before them, and wait with it for a forward; `forced_tokens`: all
    such.
    `fault`: why no token can be chosen any more.
    `logprobs` of the answer, where it asks for them; `counts` of its tokens, where a rule does.
    `over`: why the answer has ended, where its last tokens have no log-probabilities yet.
    """

    sequence: int
    params: SamplingParams
    place: Placement
    ids: Ids
    end: int
    admitted_s: float
    repaired: int = 0
    cached_tokens: int = 0
    noise_key: int = 0
    conversation: Conversation | None = None
    blocks: list[Block] = field(default_factory=list)
    first_token_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    counts: TokenCounts | None = None
    num_answered: int = 0
    is_waiting: bool = False
    has_ended: bool = False
    guide: Guide | None = None
    run: int = 0
    forced_tokens: int = 0
    fault: str | None = None
    over: FinishReason | None = None

    @property
    def next_position(self) -> int:
        """Where the last generated token goes when it is fed back."""
        return self.end + len(self.token_ids) - 1

    @property
    def is_unread(self) -> bool:
        """Whether some of its tokens have no log-probabilities yet, and need them."""
        return self.params.logprobs is not None and len(self.logprobs) < len(self.token_ids)

    def has_slots(self, count: int) -> bool:
        """For its next `count` tokens, in its last block."""
        if not self.blocks:
            return False
        last = self.blocks[-1]
        return self.end + len(self.token_ids) - 1 + count <= last.position + last.kv.length

    @property
    def last_position(self) -> int:
        """First position that never needs a slot: the last generated token is not fed back, or
        others go before it comes."""
        last = self.end + self.params.max_new_tokens - 1
        conversation = self.conversation
        if conversation is None or conversation.eviction.evictor == "none":
            return last
        return min(last, conversation.next_position + conversation.room)

    @property
    def first_block_end(self) -> int:
        """Position up to which the first block reaches when the row is admitted now."""
        if self.conversation is not None and self.conversation.is_behind:
            return self.conversation.computed  # it ends there until the rest is computed again
        grown = self.end + max(0, len(self.token_ids) - 1) + FIRST_NEW_TOKENS
        return min(grown, self.last_position)

    @property
    def reserved_end(self) -> int:
        """The position after the last one that has a slot; 0 without blocks."""
        return self.blocks[-1].end if self.blocks else 0

    @property
    def most_slots(self) -> int:
        """Of its own, at the end of its last turn."""
        if self.conversation is not None:
            return self.conversation.most_slots
        return self.last_position - self.place.position

    @property
    def slots_to_enter(self) -> int:
        """Of its own, when it is admitted now."""
        if self.conversation is not None and self.conversation.saved is not None:
            return sum(kv.shape[-2] for _, kv in self.conversation.saved)
        return self.first_block_end - self.place.position

    @property
    def offset(self) -> int:
        """By how much its positions are less than the numbers of its tokens."""
        return 0 if self.conversation is None else self.conversation.offset

    def known_ids(self) -> NDArray[np.int64]:
        """All that follows `place.start` and was fed before, or is fed first."""
        if self.conversation is not None:
            return np.array(self.conversation.ids[self.place.start : self.conversation.computed])
        return np.concatenate([self.ids.astype(np.int64), np.array(self.token_ids[:-1], np.int64)])

    @property
    def next_slot(self) -> int:
        """The slot of `next_position`, in the last block."""
        return self.blocks[-1].slot(self.next_position)

    @property
    def open_slot(self) -> int:
        """The first of the slots that reach to `next_slot`, side by side and in order."""
        return self.place.open_slot(self.blocks)

    def closed_slots(self) -> Iterator[PlacedSlots]:
        """What of its own lies before `open_slot`."""
        return self.place.closed_slots(self.blocks)


@dataclass(eq=False, slots=True)
class PrefillJob:
    """Positions `[done, end)` of a shared span or of a row's own one, that wait for a forward.

    `token_ids` begin at `place.start`. `is_repeat`: all of this was computed before, and evicted.
    `loaded`: KV from an earlier run of positions `[place.position, done)`. `run`: where forced
    tokens of a row stand, if it is for them.
    """

    target: SharedPlacement | LiveRow
    token_ids: NDArray[np.int64]
    done: int
    is_repeat: bool
    loaded: Tensor | None = None
    run: Placement | None = None

    @property
    def place(self) -> Placement:
        if self.run is not None:
            return self.run
        return self.target.place if isinstance(self.target, LiveRow) else self.target

    @property
    def is_needed(self) -> bool:
        """Whether a row on the device waits for it."""
        if isinstance(self.target, LiveRow):
            return not self.target.has_ended
        return self.target.span.live_rows > 0

    @property
    def end(self) -> int:
        """The prompt's end, or for a row that was preempted the end of what it had generated."""
        return self.place.start + len(self.token_ids)
