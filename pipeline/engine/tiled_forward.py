"""A packed batch in calls of a few fixed sizes, so that every GEMM meets shapes it has proved.

```
 N tokens   |------ 256 ------|------ 256 ------|-- 96 --:pad|
```

The library behind a GEMM chooses its code by the number of rows. With few sizes, all of which
`strict_probe` compares on this very machine, a token's bits depend neither on that choice nor on
the tokens around it. What pads a tile sees nothing and writes to the slot that belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.engine.forward import Forward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch

SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rising: at most a third of a tile is padding from 33 tokens on. 256 rows reach 96 % of the rate
of 2,048 in float32."""
ONE_SIZE = (64,)
"""For GEMMs whose bits were not seen to be the same in all `SIZES`."""


class TiledForward:
    """See `Forward`. `batch.work` must be a `StrictWork`."""

    def __init__(self, inner: Forward, sizes: tuple[int, ...] = SIZES) -> None:
        self.name = f"tiled {inner.name}"
        self.sizes = sizes
        self._inner = inner

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        """See `Forward`; `keep` rises."""
        logits = [
            self._run_tile(tile, cache, keep[(keep >= low) & (keep < high)] - low)
            for low, high, tile in self._tiles(batch, cache)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _run_tile(self, tile: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        """The head runs in the same sizes as all else."""
        padding = _size_for(self.sizes, len(keep)) - len(keep) if len(keep) else 0
        return self._inner(tile, cache, pad(keep, (0, padding)))[: len(keep)]

    def _tiles(self, batch: PackedBatch, cache: KVCache) -> Iterator[tuple[int, int, PackedBatch]]:
        """(first token, last token + 1, padded tile), in the order of the tokens: parents first."""
        tokens = batch.input_ids.shape[1]
        for low in range(0, tokens, self.sizes[-1]):
            high = min(low + self.sizes[-1], tokens)
            size = _size_for(self.sizes, high - low)
            yield low, high, _cut(batch, low, high, size, cache.capacity)


def _size_for(sizes: tuple[int, ...], count: int) -> int:
    return next(size for size in sizes if size >= count)


def _cut(batch: PackedBatch, low: int, high: int, size: int, spare_slot: int) -> PackedBatch:
    """Tokens `[low, high)` of a batch, padded to `size`.

    Every tile makes all copies of short edges: one that comes too early, before what it reads was
    computed, is made again by the tile that needs it.
    """
    padding = (0, size - (high - low))
    return replace(
        batch,
        input_ids=pad(batch.input_ids[:, low:high], padding),
        position_ids=pad(batch.position_ids[:, low:high], padding),
        slots=pad(batch.slots[low:high], padding, value=spare_slot),
        work=batch.work.part(low, high, size),
    )
