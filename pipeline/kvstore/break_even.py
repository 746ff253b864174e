"""From which depth on loading a stored prefix beats computing it. Pure arithmetic, and its probe.

Loading costs a fixed time for each entry and then so much per byte; computing costs so much per
token. Below the depth k* at which the two are equal the store is not used (docs/recycling.md).
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.kvstore.identity import Identity
from pipeline.kvstore.store import KVStore

_PROBE_BYTES = 8 << 20
_REPEATS = 5


@dataclass(frozen=True)
class LoadCost:
    """Seconds for an entry of any size, and bytes per second beyond that."""

    entry_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """What one entry of so many bytes takes."""
        return self.entry_s + num_bytes / self.bytes_per_s


def break_even_tokens(
    cost: LoadCost, bytes_per_token: int, prefill_tokens_per_s: float
) -> int | None:
    """The least depth k* in tokens that is worth loading; None where computing always wins."""
    gain_per_token_s = 1 / prefill_tokens_per_s - bytes_per_token / cost.bytes_per_s
    if gain_per_token_s <= 0:
        return None
    return max(1, math.ceil(cost.entry_s / gain_per_token_s))


def measure_load_cost(folder: Path, identity: Identity) -> LoadCost:
    """Load a small and a large entry, just written, on the disk of `folder`; medians of five.

    What was written is in the page cache: a store that has to be read from the disk is slower.
    Raises OSError, UsageError if nothing can be written there.
    """
    layers, heads, size = identity.layout
    dtype = getattr(torch, identity.dtype)
    per_token = 2 * layers * heads * size * dtype.itemsize
    lengths = (1, max(2, _PROBE_BYTES // per_token))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".coppice-probe-") as probe:
        ids = [np.full(n, index, np.uint32) for index, n in enumerate(lengths)]
        with KVStore.open(Path(probe), identity, 1 << 40) as store:
            for own in ids:
                store.put(own, 0, torch.zeros(layers, 2, heads, len(own), size, dtype=dtype))
        loads = [[_load(Path(probe), identity, own) for _ in range(_REPEATS)] for own in ids]
    seconds = np.median(loads, axis=1).tolist()
    per_byte_s = (seconds[1] - seconds[0]) / ((lengths[1] - lengths[0]) * per_token)
    return LoadCost(seconds[0], 1 / max(per_byte_s, 1e-12))


def _load(folder: Path, identity: Identity, ids: np.typing.NDArray[np.uint32]) -> float:
    """Seconds until all bytes of an entry are in memory of ours, its check included."""
    with KVStore.open(folder, identity, 1 << 40) as store:
        begin = time.perf_counter()
        kv = store.load(ids, 0, len(ids))
        assert kv is not None
        kv.clone()
        return time.perf_counter() - begin
