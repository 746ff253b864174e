"""From which size on it pays that rows share a span in decode, measured once and kept.

A span of `p` tokens above G rows costs a kernel one more span when it is shared, and p * (G - 1)
more keys when each row has a copy (ARCHITECTURE.md, Attention over a tree). So it pays from

    p * (G - 1) >= (seconds of a span) / (seconds of a key)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, TypeAdapter

from pipeline.engine.backend import Backend
from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.measured_once import fingerprint, measured_once, median_seconds
from pipeline.engine.packing import Packer, pack_decode
from pipeline.model.model import LoadedModel

_ROWS = 32
_KEYS = 128  # of each row, or as many as the model's context holds
_PARTS = 8  # spans that they are cut into
_ALWAYS_SHARE = 1.0


_SCHEMA = TypeAdapter(Annotated[float, Field(ge=0.0, allow_inf_nan=False)])


def break_even_tokens(loaded: LoadedModel, backend: Backend, cache: Path | None = None) -> float:
    """The least p * (G - 1) for this model on this device: from the cache, else measured and kept.

    `cache` is a folder; by default the user's.
    """
    name = fingerprint(loaded, backend)
    return measured_once("cost", name, lambda: measure(loaded, backend), _SCHEMA, cache)


@torch.inference_mode()
def measure(loaded: LoadedModel, backend: Backend) -> float:
    """Time forwards of decoding rows that differ in one thing each; about a second."""
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    keys = min(_KEYS, (loaded.shape.context_length or _KEYS + 1) - 1)
    cache = KVCache(shape, _ROWS * (keys + 1), like=next(loaded.model.parameters()))
    cache.arena.zero_()
    bench = _Bench(loaded, backend, cache, keys)
    shared, own, parts = bench.seconds(0), bench.seconds(1), bench.seconds(_PARTS)
    span_s = max(0.0, (parts - own) / (_ROWS * (_PARTS - 1)))
    key_s = (own - shared - span_s * (_ROWS - 1)) / (keys * (_ROWS - 1))
    return span_s / key_s if key_s > 0 else _ALWAYS_SHARE


class _Bench:
    """Forwards of rows that each hold one token of their own and see `keys` earlier ones."""

    def __init__(self, loaded: LoadedModel, backend: Backend, cache: KVCache, keys: int) -> None:
        self._backend = backend
        self._packer = Packer(backend.kernel, loaded.device)
        self._cache = cache
        self._keys = keys
        self._device = loaded.device

    def seconds(self, parts: int) -> float:
        """Median time. The earlier keys are the row's own in `parts` spans; 0: all share one."""
        above = np.array([[0, _ROWS, 0, self._keys, 0]], np.int64)
        if parts:
            above = np.concatenate([self._own_parts(row, parts) for row in range(_ROWS)])
        slot = _ROWS * self._keys + np.arange(_ROWS)
        keep = torch.arange(_ROWS, device=self._device)

        def decode() -> None:
            batch = pack_decode(
                np.ones(_ROWS, np.int64), np.full(_ROWS, self._keys), (slot, slot + 1), above,
                self._packer,
            )  # fmt: skip
            self._backend.forward(batch, self._cache, keep)

        return median_seconds(decode, self._device, math.inf)

    def _own_parts(self, row: int, parts: int) -> KVSpans:
        edges = np.linspace(0, self._keys, parts + 1).astype(np.int64)
        low, high = edges[:-1], edges[1:]
        queries, first = np.full(parts, row), row * self._keys
        return np.stack([queries, queries + 1, first + low, first + high, low], 1)
