"""What becomes of a conversation's KV when tokens go, and while it is off the device.

Runs stay where they are and what lies between them is given back. Where too many runs would be
left, or where each head keeps other tokens, what is kept is gathered into one new range:

```
 runs       |aa|..|bbb|....|c|...          a, b, c stay, and the slots between them are free
 gathered   |aabbbc|                       of each layer and head its own a, b, c
```
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine.conversation import Conversation, KeptRun
from pipeline.engine.kv_cache import KVRange
from pipeline.engine.residency import Residency
from pipeline.engine.rotary import Rotary
from pipeline.engine.spans import Block, Placement

Value = TypeVar("Value", np.int64, np.bool_)
MOST_RUNS = 16
"""Of a conversation's own: each is a span more for the kernel, or a view of each query."""


class KeptKV:
    """The KV of conversations in one cache. Whoever keeps slot numbers counts each call as a
    change."""

    def __init__(self, residency: Residency, rotary: Rotary | None) -> None:
        """`rotary`: None where nothing is ever evicted."""
        self._residency = residency
        self.rotary = rotary

    @property
    def arena(self) -> torch.Tensor:
        """See `KVCache`."""
        return self._residency.cache.arena

    def keep(
        self, conversation: Conversation, runs: list[KeptRun], masks: list[NDArray[np.bool_]]
    ) -> None:
        """Of `runs`, all that it has, what `masks` say: each in the shape of its run's numbers."""
        if _gathers(runs, masks):
            self._gather(conversation, runs, masks)
            return
        own = [i for i, run in enumerate(runs) if not run.is_shared]
        conversation.shared = [
            (run.slots.position + low, run.slots.position + high)
            for run, mask in zip(runs, masks, strict=True)
            if run.is_shared
            for low, high in _parts(mask)
        ]
        blocks, filled = [], iter(own)
        for block in conversation.blocks:
            mask = np.zeros(0, bool)
            if block.position < min(block.end, conversation.next_position):
                mask = masks[next(filled)]
            blocks += self._cut(block, mask)
        conversation.blocks[:] = blocks
        conversation.num_kept = int(sum(mask.sum() for mask in masks))

    def more_slots(
        self, conversation: Conversation, runs: list[KeptRun], masks: list[NDArray[np.bool_]]
    ) -> int:
        """Slots that `keep` needs besides those that it has: what is gathered of shared runs
        becomes its own."""
        if not _gathers(runs, masks):
            return 0
        first_head = [masks[i].reshape(-1, runs[i].length)[:1] for i in _moved(runs, masks)]
        gathered = sum(int(mask.sum()) for mask in first_head)
        return gathered - sum(block.kv.length for block in conversation.blocks)

    def _cut(self, block: Block, mask: NDArray[np.bool_]) -> list[Block]:
        """What is kept of a block. Slots beyond its tokens stay with the last of them."""
        parts = _parts(mask)
        if parts and parts[-1][1] == len(mask) and block.numbers is None:
            parts[-1] = parts[-1][0], block.kv.length
        ranges = self._residency.split(block.kv, parts)
        return [
            Block(
                kv,
                block.position + low,
                block.first + low,
                None if block.numbers is None else block.numbers[..., low:high],
            )
            for kv, (low, high) in zip(ranges, parts, strict=True)
        ]

    def _gather(
        self, conversation: Conversation, runs: list[KeptRun], masks: list[NDArray[np.bool_]]
    ) -> None:
        """All that is kept into one range before the next token, but shared runs that every head
        keeps whole. Where runs are moved together the keys are turned to where they stand now."""
        moved = _moved(runs, masks)
        stays = runs[: len(runs) - len(moved)]
        arena = self._residency.cache.arena
        shape = (arena.shape[0], arena.shape[2])
        chosen = _by_head([masks[i] for i in moved], shape)
        count = int(chosen[0, 0].sum())
        assert (chosen.sum(-1) == count).all(), "each head keeps as many"
        slots = np.concatenate([np.arange(runs[i].slots.low, runs[i].slots.high) for i in moved])
        stands = _by_head([conversation.stands(runs[i]) for i in moved], shape)
        born = _by_head([self._born(conversation, runs[i]) for i in moved], shape)
        numbers = _by_head([runs[i].numbers for i in moved], shape)
        at = slots[np.argsort(~chosen, axis=-1, kind="stable")[..., :count]]
        held = arena_gather(arena, at)
        numbers, born, stands = (_take(x, chosen, count) for x in (numbers, born, stands))
        position = conversation.next_position - count
        turns = (position + np.arange(count) if conversation.rerotates else stands) - born
        if (
            turns.any()
        ):  # without rerotating: keys that are shared, in a conversation with an offset
            self._turn(held, turns)
            conversation.key_turns += 1
        for block in conversation.blocks:
            self._residency.free(block.kv)
        kv = self._residency.reserve(count, from_left=False)
        arena[..., kv.start : kv.stop, :] = held
        is_one_set = not any(masks[i].ndim > 1 for i in moved) and not any(
            runs[i].numbers.ndim > 1 for i in moved
        )
        block = Block(kv, position, 0, numbers[0, 0] if is_one_set else numbers)
        conversation.blocks[:] = [block] if count else []
        conversation.shared = [
            (run.slots.position, run.slots.position + run.length) for run in stays
        ]
        conversation.num_kept = count + sum(high - low for low, high in conversation.shared)

    def _born(self, conversation: Conversation, run: KeptRun) -> NDArray[np.int64]:
        """By which positions its keys are turned, in the shape of its numbers."""
        if run.is_gathered and not conversation.rerotates:
            return run.numbers - conversation.offset
        born = np.arange(run.slots.position, run.slots.position + run.length)
        return np.broadcast_to(born, run.numbers.shape)

    def lay_together(self, conversation: Conversation) -> None:
        """From now on kept runs stand side by side. Gathered keys, which stand where they were
        born, are turned; others are seen by views."""
        if conversation.rerotates:
            return
        arena = self._residency.cache.arena
        for block in conversation.blocks:
            if block.numbers is not None:
                kv = arena[..., block.kv.start : block.kv.stop, :]
                shape = (arena.shape[0], arena.shape[2])
                born = _by_head([block.numbers - conversation.offset], shape)
                target = block.position + np.arange(block.kv.length)
                self._turn(kv, target - born)
                conversation.key_turns += 1
        conversation.rerotates = True

    def rebase(self, conversation: Conversation, place: Placement) -> None:
        """Positions become small again: keys are turned once, and tokens stand as they stood."""
        runs = [run for run in conversation.runs(place) if not run.is_shared]
        base = min((int(conversation.stands(run).min()) for run in runs), default=0)
        if base <= 0:
            return
        arena = self._residency.cache.arena
        shifts = {run.slots.low: run.shift for run in runs}
        for block in conversation.blocks:
            shift = shifts.get(block.kv.start, 0) - base
            kv = arena[..., block.kv.start : block.kv.stop, :]
            self._turn(kv, np.full((arena.shape[0], arena.shape[2], block.kv.length), shift))
            block.position += shift
        conversation.offset += base
        conversation.key_turns += 1

    def size(self, conversation: Conversation) -> int:
        """Bytes that `save` takes."""
        now = conversation.next_position
        filled = sum(max(0, min(b.end, now) - b.position) for b in conversation.blocks)
        return filled * self._residency.cache.bytes_per_token

    def save(self, conversation: Conversation) -> None:
        """Copy its blocks to memory of the host. Their ranges are the caller's to free."""
        arena, now = self._residency.cache.arena, conversation.next_position
        conversation.saved = [
            (
                replace(block, kv=KVRange(0, 0)),
                arena[..., block.kv.start : block.slot(min(block.end, now)), :].to(
                    "cpu", copy=True
                ),
            )
            for block in conversation.blocks
            if block.position < now
        ]

    def restore(self, conversation: Conversation) -> None:
        """Give its blocks slots again, which must be free, and put what was saved into them."""
        arena = self._residency.cache.arena
        for block, kv in conversation.saved or ():
            block.kv = self._residency.reserve(kv.shape[-2], from_left=False)
            conversation.blocks.append(block)
        for block, kv in conversation.saved or ():  # ranges may have moved while others were made
            arena[..., block.kv.start : block.kv.stop, :] = kv.to(arena.device)
        conversation.saved = None

    def _turn(self, kv: torch.Tensor, turns: NDArray[np.int64]) -> None:
        """Keys of kv [layers, 2, heads, n, d] by `turns` [layers, heads, n] positions, in place."""
        assert self.rotary is not None, "nothing is evicted without"
        for layer in range(len(kv)):
            keys = kv[layer, 0]
            by = torch.from_numpy(np.ascontiguousarray(turns[layer]).ravel()).to(kv.device)
            flat = keys.reshape(-1, 1, keys.shape[-1])
            kv[layer, 0] = self.rotary.turn(layer, flat, by).view(keys.shape)


def saved_bytes(conversation: Conversation) -> int:
    """In memory of the host."""
    return sum(kv.numel() * kv.element_size() for _, kv in conversation.saved or ())


def arena_gather(arena: torch.Tensor, slots: NDArray[np.int64]) -> torch.Tensor:
    """KV [layers, 2, heads, n, d] of slots [layers, heads, n]."""
    index = torch.from_numpy(slots).to(arena.device)[:, None, :, :, None]
    shape = (len(arena), 2, arena.shape[2], slots.shape[-1], arena.shape[-1])
    return arena.gather(3, index.expand(shape))


def _parts(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where it is true: [low, high), rising."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _gathers(runs: list[KeptRun], masks: list[NDArray[np.bool_]]) -> bool:
    own = [mask for run, mask in zip(runs, masks, strict=True) if not run.is_shared]
    by_head = any(mask.ndim > 1 for mask in masks)
    return by_head or sum(len(_parts(mask)) for mask in own) > MOST_RUNS


def _moved(runs: list[KeptRun], masks: list[NDArray[np.bool_]]) -> list[int]:
    """Which runs are gathered. The first ones stay as far as they are shared and kept whole; what
    lies behind others does not, or tokens would change their order."""
    stays = [run.is_shared and bool(mask.all()) for run, mask in zip(runs, masks, strict=True)]
    return list(range(stays.index(False) if False in stays else len(stays), len(stays)))


def _by_head(parts: list[NDArray[Value]], shape: tuple[int, int]) -> NDArray[Value]:
    """[n] or [layers, heads, n] each -> all of them [layers, heads, sum of n]."""
    return np.concatenate([np.broadcast_to(x, (*shape, x.shape[-1])) for x in parts], -1)


def _take(x: NDArray[np.int64], chosen: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """[layers, heads, count] of those that each head keeps."""
    return x[chosen].reshape(*x.shape[:2], count)
