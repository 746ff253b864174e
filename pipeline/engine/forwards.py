"""Forward passes of one run, and the time in which they keep the device busy. Knows no rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.backend import Backend
from pipeline.engine.counters import EngineCounters
from pipeline.engine.cuda_graphs import DecodeRunner, NextTokens
from pipeline.engine.forward import PiecewiseForward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.memory import is_exhausted, release_cached
from pipeline.engine.packing import PackedBatch
from pipeline.engine.scorer import ROWS_AT_ONCE
from pipeline.engine.step_memory import DecodeStep


class Forwards:
    """`runner`: decodes by recorded steps, where they can be recorded."""

    def __init__(
        self,
        backend: Backend,
        cache: KVCache,
        runner: DecodeRunner | None,
        device: torch.device,
        counters: EngineCounters,
    ) -> None:
        self.cache: Final = cache
        self.runner: Final = runner
        self.device: Final = device
        self.counters: Final = counters
        self._forward: Final = backend.forward
        self._start_s: Final = time.perf_counter()
        self._first_step_s: float | None = None

    @property
    def gives_pieces(self) -> bool:
        """Whether not all of the logits need be there at once."""
        return isinstance(self._forward, PiecewiseForward)

    def now(self) -> float:
        """Seconds since the run started."""
        return time.perf_counter() - self._start_s

    def logits(self, batch: PackedBatch, keep: NDArray[np.int64]) -> Tensor:
        """Logits [len(keep), V], in the model's dtype, of the packed positions `keep`."""
        begin = self._begin()
        logits = self._forward(batch, self.cache, self._there(keep))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.counters.num_forwards += 1
        self.count_busy(begin)
        return logits

    def in_pieces(self, batch: PackedBatch, keep: NDArray[np.int64]) -> Iterator[Tensor]:
        """The same, a few rows at a time where that can be."""
        if not isinstance(self._forward, PiecewiseForward):
            yield self.logits(batch, keep)
            return
        begin = self._begin()
        yield from self._forward.in_pieces(batch, self.cache, self._there(keep), ROWS_AT_ONCE)
        self.counters.num_forwards += 1
        self.count_busy(begin)

    def recorded(self, step: DecodeStep) -> NextTokens:
        """A decode step that also chooses greedy tokens on the device."""
        assert self.runner is not None
        with self.stepping():
            tokens = self.runner(step)
        self.counters.num_forwards += 1
        return tokens

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around steps of the runner that the caller starts and reads himself."""
        begin = self._begin()
        yield
        self.count_busy(begin)

    def count_busy(self, begin: float) -> None:
        """The device was busy since `begin`, by the host's clock."""
        end = time.perf_counter()
        self.counters.busy_s += end - begin
        self.counters.span_s = end - (self._first_step_s or begin)

    def can_halve(self, error: BaseException, size: int) -> bool:
        """After a step of this size failed. Raises `error` unless memory is what failed."""
        if not is_exhausted(error):
            raise error
        self.counters.memory_retries += 1
        release_cached(self.device)
        return size > 1

    def _begin(self) -> float:
        begin = time.perf_counter()
        if self._first_step_s is None:
            self._first_step_s = begin
        return begin

    def _there(self, keep: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(keep).to(self.device)
