"""What a forward costs on this machine, measured once per model and device, and kept.

    seconds = step + token * tokens + segment * segments + key * keys + pair * pairs

`keys` counts a segment's keys once whatever the number of its queries, `pairs` every query's own
keys. The decision that rests on it: a span of `p` tokens above G rows costs one segment when it is
shared in decode, and p * (G - 1) more keys when each row has a copy (engine.md §2.6).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.engine.backend import Backend
from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.machine import cache_folder, cpu_description
from pipeline.engine.model import LoadedModel
from pipeline.engine.packing import pack_decode

_ROWS = 32
_KEYS = 128  # of each row, or as many as the model's context holds
_PARTS = 8  # segments that they are cut into
_REPEATS = 5
_ALWAYS_SHARE = 1.0


@dataclass(frozen=True)
class CostModel:
    """Seconds; see the module's formula. None is negative."""

    step_s: float
    token_s: float
    segment_s: float
    key_s: float
    pair_s: float

    def forward_s(self, tokens: int, segments: int, keys: int, pairs: int) -> float:
        """Expected seconds of one forward."""
        return (
            self.step_s
            + self.token_s * tokens
            + self.segment_s * segments
            + self.key_s * keys
            + self.pair_s * pairs
        )

    @property
    def break_even_tokens(self) -> float:
        """p * (G - 1) from which sharing a span in decode pays."""
        return self.segment_s / self.key_s if self.key_s > 0 else _ALWAYS_SHARE


def calibrated(loaded: LoadedModel, backend: Backend, cache: Path | None = None) -> CostModel:
    """The cost model of this model on this device: from the cache, else measured and kept.

    `cache` is a folder; by default the user's. A cache that cannot be written is no error.
    """
    path = (cache or cache_folder() / "cost") / f"{_fingerprint(loaded, backend)}.json"
    try:
        return CostModel(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # absent, or written by another version
    model = measure(loaded, backend)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dataclasses.asdict(model), file)
        os.replace(file.name, path)
    except OSError:
        pass
    return model


@torch.inference_mode()
def measure(loaded: LoadedModel, backend: Backend) -> CostModel:
    """Time forwards of decoding rows that differ in one thing each; about a second."""
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    keys = min(_KEYS, (loaded.shape.context_length or _KEYS + 1) - 1)
    cache = KVCache(shape, _ROWS * (keys + 1), like=next(loaded.model.parameters()))
    cache.arena.zero_()
    bench = _Bench(loaded, backend, cache, keys)
    few, many = bench.seconds(_ROWS // 4, 0), bench.seconds(_ROWS, 0)
    token_s = max(0.0, (many - few) / (_ROWS - _ROWS // 4))
    shared = bench.seconds(_ROWS, 0, shared=1)
    own, parts = bench.seconds(_ROWS, 1), bench.seconds(_ROWS, _PARTS)
    segment_s = max(0.0, (parts - own) / (_ROWS * (_PARTS - 1)))
    key_s = max(0.0, (own - shared - segment_s * (_ROWS - 1)) / (keys * (_ROWS - 1)))
    pair_s = max(0.0, (shared - many - segment_s - key_s * keys) / (keys * _ROWS))
    step_s = max(0.0, few - token_s * (_ROWS // 4))
    return CostModel(step_s, token_s, segment_s, key_s, pair_s)


class _Bench:
    """Forwards of rows that each hold one token of their own and see `keys` earlier ones."""

    def __init__(self, loaded: LoadedModel, backend: Backend, cache: KVCache, keys: int) -> None:
        self._backend = backend
        self._cache = cache
        self._keys = keys
        self._device = loaded.device

    def seconds(self, rows: int, parts: int, shared: int = 0) -> float:
        """Median time. The earlier keys are the row's own in `parts` segments, or all share one."""
        segments = [self._own_parts(row, parts) for row in range(rows)] if parts else []
        if shared:
            segments.append(np.array([[0, rows, 0, self._keys, 0]], np.int64))
        above = np.concatenate([np.zeros((0, 5), np.int64), *segments])
        slot = _ROWS * self._keys + np.arange(rows)
        keep = torch.arange(rows, device=self._device)
        times = []
        for _ in range(_REPEATS + 1):
            begin = time.perf_counter()
            batch = pack_decode(
                np.ones(rows, np.int64), np.full(rows, self._keys), (slot, slot + 1), above,
                self._backend.kernel, self._device,
            )  # fmt: skip
            self._backend.forward(batch, self._cache, keep)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def _own_parts(self, row: int, parts: int) -> KVSpans:
        edges = np.linspace(0, self._keys, parts + 1).astype(np.int64)
        low, high = edges[:-1], edges[1:]
        queries, first = np.full(parts, row), row * self._keys
        return np.stack([queries, queries + 1, first + low, first + high, low], 1)


def _kernel_sources() -> str:
    """A hash of the kernels' code: another version of them costs something else."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).with_name("kernels").glob("*.[cph]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _fingerprint(loaded: LoadedModel, backend: Backend) -> str:
    """Of all that the measured times depend on."""
    shape, device = loaded.shape, loaded.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_description()
    size = sum(p.numel() for p in loaded.model.parameters())
    parts = (
        shape.family, shape.num_layers, shape.num_kv_heads, shape.head_dim, size,
        loaded.model.dtype, place, torch.get_num_threads(), torch.__version__,
        backend.kernel.name, backend.forward.name, _kernel_sources(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
