"""One block of KV memory outside the model, cut into contiguous ranges. Knows no prompts, no tree.

Shared nodes are placed from the left, the rows' own ranges from the right: rows come and go
quickly, and so cannot tear holes between the long-lived nodes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.memory import free_memory, is_exhausted, release_cached

_SHARE_OF_FREE_MEMORY = {"cpu": 0.5, "cuda": 0.8}


@dataclass(eq=False)
class KVRange:
    """Slots `[start, start + length)`; only `KVCache.compact` and `KVCache.extend` change it."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """The slot after its last one."""
        return self.start + self.length


class KVCache:
    """Keys and values of all layers: `arena` is [layers, 2, kv_heads, capacity + 1, head_dim].

    The slot `capacity` belongs to no range: what pads a recorded step may write there.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        capacity: int,
        like: Tensor,
        arena: Tensor | None = None,
    ) -> None:
        """`shape` is (layers, kv_heads, head_dim); dtype and device are those of `like`. `arena`:
        memory of an earlier cache, all of which is free again; its size is the capacity then."""
        layers, kv_heads, head_dim = shape
        if arena is None:
            slots = (layers, 2, kv_heads, capacity + 1, head_dim)
            arena = torch.empty(slots, dtype=like.dtype, device=like.device)
        self.arena = arena
        self.capacity = capacity = arena.shape[3] - 1
        self.bytes_per_token = 2 * layers * kv_heads * head_dim * like.element_size()
        self.used_tokens = 0
        self.peak_tokens = 0
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # half open, rising

    @property
    def free_tokens(self) -> int:
        """Slots in all gaps together."""
        return self.capacity - self.used_tokens

    def acquire(self, length: int, *, from_left: bool, reach: int = 0) -> KVRange | None:
        """Reserve `length` contiguous slots, or None where no gap is long enough.

        A range from the right that may grow to `reach` slots goes where they are free, if anywhere.
        """
        if length == 0:
            return KVRange(0, 0)
        gaps = range(len(self._free)) if from_left else range(len(self._free) - 1, -1, -1)
        for wanted in (max(length, reach), length):
            for index in gaps:
                low, high = self._free[index]
                if high - low >= wanted:
                    start = low if from_left else high - wanted
                    self._take(index, start, length)
                    return KVRange(start, length)
        return None

    def extend(self, kv_range: KVRange, length: int) -> bool:
        """Lengthen a range by `length` slots in place; False unless those after it are free."""
        stop = kv_range.stop
        index = bisect.bisect_left(self._free, (stop, stop))
        if index == len(self._free):
            return False
        low, high = self._free[index]
        if low != stop or high - low < length:
            return False
        self._take(index, stop, length)
        kv_range.length += length
        return True

    def _take(self, index: int, start: int, length: int) -> None:
        """Slots `[start, start + length)` of a gap are free no more."""
        low, high = self._free[index]
        rest = [(low, start), (start + length, high)]
        self._free[index : index + 1] = [gap for gap in rest if gap[0] < gap[1]]
        self.used_tokens += length
        self.peak_tokens = max(self.peak_tokens, self.used_tokens)

    def release(self, kv_range: KVRange) -> None:
        """Give the slots back; the range must not be used any more."""
        if kv_range.length == 0:
            return
        self.used_tokens -= kv_range.length
        low, high = kv_range.start, kv_range.stop
        index = bisect.bisect_left(self._free, (low, high))
        if index < len(self._free) and self._free[index][0] == high:
            high = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == low:
            index -= 1
            low = self._free.pop(index)[0]
        self._free.insert(index, (low, high))

    def split(self, kv_range: KVRange, kept: list[tuple[int, int]]) -> list[KVRange]:
        """Ranges of these parts `[low, high)` of a range, which is used no more; the other slots
        are given back. `kept` rises, counted from the range's start, and no part is empty."""
        edges = [0, *(edge for part in kept for edge in part), kv_range.length]
        start = kv_range.start
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            self.release(KVRange(start + low, high - low))
        return [KVRange(start + low, high - low) for low, high in kept]

    def copy(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy slots `source` to `target` [n] in all layers."""
        if len(source):
            moved = self.arena[..., torch.from_numpy(source).to(self.arena.device), :]
            self.arena[..., torch.from_numpy(target).to(self.arena.device), :] = moved

    def compact(self, ranges: list[KVRange]) -> None:
        """Move `ranges`, which must be all that is reserved, to the left end, in order."""
        assert sum(r.length for r in ranges) == self.used_tokens, "compact needs every live range"
        low = 0
        for kv_range in sorted(ranges, key=lambda r: r.start):
            if kv_range.length and kv_range.start != low:
                moved = self.arena[..., kv_range.start : kv_range.stop, :].clone()
                self.arena[..., low : low + kv_range.length, :] = moved
                kv_range.start = low
            low += kv_range.length
        self._free = [(low, self.capacity)] if low < self.capacity else []


def kv_capacity(
    budget: int | None, bytes_per_token: int, needed_tokens: int, device: torch.device
) -> int:
    """Slots to reserve: what the job can use, within `budget` bytes or a share of memory."""
    if budget is None:
        budget = int(free_memory(device) * _SHARE_OF_FREE_MEMORY[device.type])
    return min(needed_tokens, budget // bytes_per_token)


def reserve_kv(shape: tuple[int, int, int], capacity: int, like: Tensor) -> KVCache:
    """A cache of `capacity` slots, or of half as many, and so on, where memory gives no more.

    Raises what the allocation raised when there is no memory for a single slot.
    """
    while True:
        try:
            return KVCache(shape, capacity, like)
        except (MemoryError, RuntimeError) as error:
            if capacity < 2 or not is_exhausted(error):
                raise
            release_cached(like.device)
            capacity //= 2
