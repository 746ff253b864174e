"""From pieces of prompts to one packed forward `[1, N]`. Knows slots and positions, not the model.

A *piece* is a run of new tokens of one node or row. Its queries see, in this order:

```
 shared ranges above        own earlier tokens     itself
 [s0 .. e0) [s1 .. e1) ...  [.. slot)              causal
 |-- levels, dense ----|    |- level, dense -|     |- base -|
```

Pieces come in depth-first order, so all queries below one node lie side by side: one dense product
serves them all (engine.md §2.4). A decoding row is one query whose base is its own range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SlotRange = tuple[int, int]
Items = NDArray[np.int64]
"""[items, 4]: queries `[q_lo, q_hi)` of the packed row see all keys in slots `[kv_lo, kv_hi)`."""

_BUCKET_CELLS = 1 << 16  # query x key pairs above which an item fills the device alone
_BUCKET_KEYS = 512  # keys above which gathering them costs more than a call of its own
_PADDED_CELLS = 1 << 24  # padded query x key pairs of one bucket: bounds its memory


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one span: ids [n], first position, first slot, and what they see."""

    token_ids: NDArray[np.int64]
    position: int
    slot: int
    own: SlotRange
    ancestors: tuple[SlotRange, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DenseItem:
    """One row of `Items` that is a call of its own."""

    q_lo: int
    q_hi: int
    kv_lo: int
    kv_hi: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Small items done as one padded product.

    `queries` [B, M] and `keys` [B, L] index tokens and slots; a padded key repeats a valid slot (so
    that its value is finite) and `bias` [B, 1, 1, L] hides it. `source`, `target`: which of the
    B * M results belong to which tokens.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    source: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """Items whose queries do not overlap: large ones on their own, small ones in buckets."""

    singles: tuple[DenseItem, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All that attention needs to know about one forward of N tokens; built once, used per layer.

    `input_ids`, `position_ids` [1, N]; `slots` [N] where new K and V go; `copy_from`, `copy_to`
    slots copied after that write. `base` covers every token exactly once: the piece itself,
    causally (its "keys" are then tokens of this forward), or a decoding row's own span. The
    results of `levels` are merged into it.
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    base: Level
    base_is_causal: bool
    levels: tuple[Level, ...]
    copy_from: Tensor | None = None
    copy_to: Tensor | None = None


def pack_prefill(
    pieces: list[Piece],
    copies: tuple[NDArray[np.int64], NDArray[np.int64]],
    device: torch.device,
) -> PackedBatch:
    """One forward over `pieces`, in depth-first order, with slots `copies` (from, to)."""
    columns = [(len(p), p.position, p.slot, *p.own) for p in pieces]
    length, position, slot, own_lo, own_hi = np.array(columns, np.int64).T
    high = np.cumsum(length)
    low = high - length
    own = np.stack([low, high, own_lo, own_hi], 1)[own_lo < own_hi]
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    levels = [*shared_levels([p.ancestors for p in pieces], bounds), own]
    place = np.arange(high[-1]) - np.repeat(low, length)
    copy_from, copy_to = (torch.from_numpy(c).to(device) if len(c) else None for c in copies)
    return PackedBatch(
        input_ids=_row(np.concatenate([p.token_ids for p in pieces]), device),
        position_ids=_row(np.repeat(position, length) + place, device),
        slots=_row(np.repeat(slot, length) + place, device)[0],
        base=make_level(np.stack([low, high, low, high], 1), device),
        base_is_causal=True,
        levels=tuple(make_level(items, device) for items in levels if len(items)),
        copy_from=copy_from,
        copy_to=copy_to,
    )


def pack_decode(
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    own: tuple[NDArray[np.int64], NDArray[np.int64]],
    levels: tuple[Level, ...],
    device: torch.device,
) -> PackedBatch:
    """One forward of one new token a row, rows in depth-first order; all arrays [rows] int64.

    `own` is (first slot, last slot + 1) of each row's span with the new token's slot as the last.
    """
    low, high = own
    rows = np.arange(len(low))
    return PackedBatch(
        input_ids=_row(token_ids, device),
        position_ids=_row(positions, device),
        slots=_row(high - 1, device)[0],
        base=make_level(np.stack([rows, rows + 1, low, high], 1), device),
        base_is_causal=False,
        levels=levels,
    )


def shared_levels(
    ancestors: list[tuple[SlotRange, ...]], bounds: list[tuple[int, int]]
) -> list[Items]:
    """By depth, one item for each shared range, over all the neighbouring queries below it."""
    levels: list[list[list[int]]] = []
    for spans, (low, high) in zip(ancestors, bounds, strict=True):
        for depth, (kv_lo, kv_hi) in enumerate(spans):
            if depth == len(levels):
                levels.append([])
            row = levels[depth]
            if row and row[-1][1] == low and row[-1][2] == kv_lo:
                row[-1][1] = high
            else:
                row.append([low, high, kv_lo, kv_hi])
    return [np.array(level, np.int64) for level in levels]


def make_level(items: Items, device: torch.device) -> Level:
    """Split items into singles and buckets of similar shape."""
    queries, keys = items[:, 1] - items[:, 0], items[:, 3] - items[:, 2]
    is_single = (queries * keys > _BUCKET_CELLS) | (keys > _BUCKET_KEYS)
    singles = tuple(DenseItem(*item) for item in items[is_single].tolist())
    small = items[~is_single]
    shape = (_grade(queries[~is_single]) << 32) | _grade(keys[~is_single])
    order = np.argsort(shape, kind="stable")
    graded = shape[order]
    buckets = []
    begin = 0
    for end in [*(np.flatnonzero(np.diff(graded)) + 1).tolist(), len(graded)]:
        if begin < end:
            cells = int(graded[begin] >> 32) * int(graded[begin] & 0xFFFFFFFF)
            step = max(1, _PADDED_CELLS // cells)
            cuts = range(begin, end, step)
            buckets += [_bucket(small[order[i : min(i + step, end)]], device) for i in cuts]
        begin = end
    return Level(singles, tuple(buckets))


def _grade(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round up to a quarter of a power of two: padding stays below a third."""
    step = 1 << np.maximum(0, np.frexp(lengths - 1.0)[1] - 2).astype(np.int64)
    graded: NDArray[np.int64] = -(-lengths // step) * step
    return graded


def _bucket(items: Items, device: torch.device) -> Bucket:
    q_lo, q_hi, kv_lo, kv_hi = (items[:, i : i + 1] for i in range(4))
    queries = q_lo + np.arange((q_hi - q_lo).max())
    valid = np.flatnonzero(queries < q_hi)
    queries = np.minimum(queries, q_hi - 1)
    keys = kv_lo + np.arange((kv_hi - kv_lo).max())
    hidden = keys >= kv_hi
    bias = np.where(hidden, -np.inf, 0.0).astype(np.float32)[:, None, None, :]
    return Bucket(
        queries=torch.from_numpy(queries).to(device),
        keys=torch.from_numpy(np.minimum(keys, kv_hi - 1)).to(device),
        bias=torch.from_numpy(bias).to(device) if hidden.any() else None,
        source=torch.from_numpy(valid).to(device),
        target=torch.from_numpy(queries.ravel()[valid]).to(device),
    )


def _row(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(0)
