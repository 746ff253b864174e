"""From pieces of prompts to one packed forward `[1, N]`. Knows slots and positions, not the model.

A *piece* is a run of new tokens of one span. Its queries see, in this order:

```
 shared spans above         own span, up to itself
 [s0 .. e0) [s1 .. e1) ...  [.. slot + n)
 |-- one for all queries   |-- causal by position
     below them --|
```

Pieces come in depth-first order, so all queries below one shared span lie side by side: one row of
`KVSpans` serves them all (ARCHITECTURE.md, Packed forwards). A decoding row is a piece of one
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.rules import KVSpans


class PlacedSlots(NamedTuple):
    """Slots `[low, high)`, which hold consecutive positions from `position` on."""

    low: int
    high: int
    position: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one span: ids [n], first position, first slot, and what they see.

    `past`: as many of the span's tokens lie right before; `above`: what is seen besides.
    """

    token_ids: NDArray[np.int64]
    position: int
    slot: int
    past: int
    above: tuple[PlacedSlots, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All that attention needs to know about one forward of N tokens; built once, used per layer.

    `input_ids`, `position_ids` [1, N]; `slots` [N] where new K and V go; `copy_from`, `copy_to`
    slots copied after that write; `work` is the kernel's own description of what each query sees.
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    kernel: AttentionKernel
    work: Any
    copy_from: Tensor | None = None
    copy_to: Tensor | None = None


def pack_prefill(
    pieces: list[Piece],
    copies: tuple[NDArray[np.int64], NDArray[np.int64]],
    kernel: AttentionKernel,
    device: torch.device,
) -> PackedBatch:
    """One forward over `pieces`, in depth-first order, with slots `copies` (from, to)."""
    columns = [(len(p), p.position, p.slot, p.past) for p in pieces]
    length, position, slot, past = np.array(columns, np.int64).T
    high = np.cumsum(length)
    low = high - length
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    shared = shared_spans([p.above for p in pieces], bounds)
    own = np.stack([low, high, slot - past, slot + length, position - past], 1)
    offset = np.arange(high[-1]) - np.repeat(low, length)
    positions = np.repeat(position, length) + offset
    copy_from, copy_to = (torch.from_numpy(c).to(device) if len(c) else None for c in copies)
    return PackedBatch(
        input_ids=_row(np.concatenate([p.token_ids for p in pieces]), device),
        position_ids=_row(positions, device),
        slots=_row(np.repeat(slot, length) + offset, device)[0],
        kernel=kernel,
        work=kernel.prepare(np.concatenate([shared, own]), positions),
        copy_from=copy_from,
        copy_to=copy_to,
    )


def pack_decode(
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    own_slots: tuple[NDArray[np.int64], NDArray[np.int64]],
    before: KVSpans,
    kernel: AttentionKernel,
    device: torch.device,
) -> PackedBatch:
    """One forward of one new token a row, rows in depth-first order; all arrays [rows] int64.

    `own_slots` is (first, last + 1) of each row's last block, with the new token's slot as the
    last; `before` are the shared spans above and the rows' earlier blocks.
    """
    spans = decode_spans(positions, own_slots, before)
    return PackedBatch(
        input_ids=_row(token_ids, device),
        position_ids=_row(positions, device),
        slots=_row(own_slots[1] - 1, device)[0],
        kernel=kernel,
        work=kernel.prepare(spans, positions),
    )


def decode_spans(
    positions: NDArray[np.int64],
    own_slots: tuple[NDArray[np.int64], NDArray[np.int64]],
    before: KVSpans,
) -> KVSpans:
    """What decoding rows see: `before`, and each its own last block; see `pack_decode`."""
    low, high = own_slots
    rows = np.arange(len(low))
    own = np.stack([rows, rows + 1, low, high, positions - (high - low) + 1], 1)
    return np.concatenate([before, own])


def shared_spans(above: list[tuple[PlacedSlots, ...]], bounds: list[tuple[int, int]]) -> KVSpans:
    """One span for each shared range, over all the neighbouring queries below it.

    `above[i]` is seen by all queries of piece i, which are `bounds[i]`.
    """
    spans: list[list[int]] = []
    latest: list[list[int]] = []  # by depth
    for seen, (low, high) in zip(above, bounds, strict=True):
        for depth, placed in enumerate(seen):
            if depth < len(latest) and latest[depth][1:] == [low, *placed]:
                latest[depth][1] = high
            else:
                span = [low, high, *placed]
                latest[depth : depth + 1] = [span]
                spans.append(span)
    return np.array(spans, np.int64).reshape(-1, 5)


def _row(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(0)
