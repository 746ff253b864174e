"""Did the KV of shared prefixes change while rows read it? Knows slots, not prompts.

A bit that flips in a shared prefix spoils every row below it, and nothing else in the job would
notice. So each shared range is summed up when it is full, and again now and then and when it is
given back; answers are handed out only when the ranges have proved unchanged since they were made.
"""

from __future__ import annotations

import time

import torch

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.spans import SharedSpan

_LEAST_INTERVAL_S = 0.02
_SHARE_OF_TIME = 0.01
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


class CorruptKVError(Exception):
    """The KV of a shared prefix is not what was computed."""


class KVGuard:
    """The sums of all shared ranges that are full; about 1 % of the time goes into checking."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._sums: dict[SharedSpan, int] = {}
        self._checked_at = time.perf_counter()
        self._interval_s = _LEAST_INTERVAL_S

    def watch(self, span: SharedSpan) -> None:
        """The span's range is full now and must not change any more."""
        self._sums[span] = self._sum(span)

    def release(self, span: SharedSpan) -> None:
        """Check for the last time. Raises CorruptKVError."""
        expected = self._sums.pop(span, None)
        if expected is not None and self._sum(span) != expected:
            raise CorruptKVError

    def check_if_due(self) -> bool:
        """Whether all ranges were checked just now. Raises CorruptKVError."""
        begin = time.perf_counter()
        if begin - self._checked_at < self._interval_s:
            return False
        for span, expected in self._sums.items():
            if self._sum(span) != expected:
                raise CorruptKVError
        self._checked_at = time.perf_counter()
        took = self._checked_at - begin
        self._interval_s = max(_LEAST_INTERVAL_S, took / _SHARE_OF_TIME)
        return True

    def _sum(self, span: SharedSpan) -> int:
        """Of all bytes as integers, which one flipped bit always changes."""
        arena = self._cache.arena
        slots = arena[..., span.kv.start : span.kv.stop, :]
        row_bytes = arena.shape[-1] * arena.element_size()
        words = slots.view(next(kind for size, kind in _WORDS if row_bytes % size == 0))
        if words.device.type == "cpu":  # torch's sum of a narrow range costs 12 ms, numpy's 0.03
            return int(words.numpy().sum(dtype="int64"))
        return int(words.sum(dtype=torch.int64))
