"""Nodes and rows on the device, and which slots hold their KV. Knows no model and no policy.

A node's KV is one range. A row's is a list of blocks, since most rows end long before
`max_new_tokens`: the first holds its prompt and the first new tokens, later ones are added as the
answer grows.

```
 positions  0 ....... span_start .. start ........ end ........................ kv_limit
 node, node |         | copied head | own prompt    | new tokens
                      |----------- blocks[0] -----------|-- blocks[1] --|
                                                                     kv_end
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kv_cache import KVRange
from pipeline.engine.packing import SlotRange
from pipeline.records import SamplingParams

FIRST_NEW_TOKENS = 32
"""New tokens that a row's first block has room for."""
BLOCK_TOKENS = 64
"""Slots of a later block."""


@dataclass(eq=False, slots=True)
class LiveNode:
    """A shared node of which some sequence below was admitted and some has not ended.

    Its range covers prompt positions `[span_start, end)`: its own edge `[start, end)`, and in a
    group node before that copies of the short edges between it and the group node above, so that
    decoding rows see one range for all of them. An evicted node's range is empty.
    `stored_end`: position up to which an earlier run's KV can be loaded; `stored_tokens`: of its
    own edge, those that were. `unfinished`: sequences below that have not ended; `live_rows`: those
    on the device; `unread`: sequences that end exactly here and have not sampled their first token
    yet (`logits` [V] waits for them).
    """

    node: int
    above: LiveNode | None
    start: int
    end: int
    span_start: int
    num_sequences: int
    unfinished: int
    unread: int
    stored_end: int = 0
    stored_tokens: int = 0
    kv: KVRange = field(default_factory=lambda: KVRange(0, 0))
    live_rows: int = 0
    was_computed: bool = False
    prefill_s: float = 0.0
    logits: Tensor | None = None

    @property
    def is_resident(self) -> bool:
        """Whether it has a range; whether that is filled already is the engine's business."""
        return self.kv.length > 0

    @property
    def is_needed(self) -> bool:
        """Whether a row on the device lies below."""
        return self.live_rows > 0


@dataclass(eq=False, slots=True)
class LiveRow:
    """A sequence that was admitted and has not ended. It has no blocks while it is preempted.

    `start` is where the tokens begin that no other sequence shares; the blocks hold positions
    `[span_start, kv_end)`.
    """

    sequence: int
    params: SamplingParams
    above: LiveNode | None
    start: int
    end: int
    span_start: int
    admitted_s: float
    cached_tokens: int = 0
    stored_end: int = 0
    stored_tokens: int = 0
    blocks: list[KVRange] = field(default_factory=list)
    kv_end: int = 0
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    has_ended: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether anything is still to be computed for it."""
        return not self.has_ended

    @property
    def kv(self) -> KVRange:
        """The range that prefill fills."""
        return self.blocks[0]

    @property
    def next_position(self) -> int:
        """Where the last generated token goes when it is fed back."""
        return self.end + len(self.token_ids) - 1

    @property
    def kv_limit(self) -> int:
        """First position that never needs a slot: the last generated token is not fed back."""
        return self.end + self.params.max_new_tokens - 1

    @property
    def first_block_end(self) -> int:
        """Position up to which the first block reaches when the row is admitted now."""
        return min(self.end + max(0, len(self.token_ids) - 1) + FIRST_NEW_TOKENS, self.kv_limit)


@dataclass(eq=False, slots=True)
class PrefillJob:
    """Positions `[done, end)` of a node or row that wait for a forward.

    `token_ids` begin at `target.start`. `is_repeat`: all of this was computed before, and evicted.
    `loaded`: KV from an earlier run of positions `[target.span_start, done)`.
    """

    target: LiveNode | LiveRow
    token_ids: NDArray[np.int64]
    done: int
    is_repeat: bool
    loaded: Tensor | None = None

    @property
    def end(self) -> int:
        """The prompt's end, or for a row that was preempted the end of what it had generated."""
        return self.target.start + len(self.token_ids)


def nodes_above(target: LiveNode | LiveRow) -> Iterator[LiveNode]:
    """From the nearest one to the top."""
    node = target.above
    while node is not None:
        yield node
        node = node.above


def spans_before(target: LiveNode | LiveRow, position: int) -> tuple[SlotRange, ...]:
    """Slots of the shared ranges that tile prompt positions `[0, position)`, top first.

    In prefill `position` is where the target's own tokens begin; a decoding row asks for all before
    its own range. A group node's range reaches back over the short edges above it.
    """
    spans: list[SlotRange] = []
    for node in nodes_above(target):
        if node.end == position:
            spans.append((node.kv.start, node.kv.start + node.kv.length))
            position = node.span_start
    return tuple(reversed(spans))


def copied_head(target: LiveNode | LiveRow) -> NDArray[np.int64]:
    """Slots where the short shared edges `[span_start, start)` above `target` were computed."""
    slots = [np.zeros(0, np.int64)]
    for node in nodes_above(target):
        if node.end <= target.span_start:
            break
        slots.append(np.arange(node.kv.start, node.kv.start + node.kv.length))
    return np.concatenate(slots[::-1])
