"""From pieces of prompts to one packed forward `[1, N]`. Knows slots and positions, not the model.

A *piece* is a run of new tokens of one node or row. Its queries see, in this order:

```
 shared ranges above        own range, up to itself
 [s0 .. e0) [s1 .. e1) ...  [.. slot + n)
 |-- segments, one for     |-- segment, causal by position
     all queries below --|
```

Pieces come in depth-first order, so all queries below one node lie side by side: one segment
serves them all (ARCHITECTURE.md, Packed forwards). A decoding row is a piece of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.rules import Segments

SlotRange = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one span: ids [n], first position, first slot, and what they see.

    `own` are the slots of the span's earlier tokens, `ancestors` those of the positions before.
    """

    token_ids: NDArray[np.int64]
    position: int
    slot: int
    own: SlotRange
    ancestors: tuple[SlotRange, ...]

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
    columns = [(len(p), p.position, p.slot, p.own[1] - p.own[0]) for p in pieces]
    length, position, slot, past = np.array(columns, np.int64).T
    high = np.cumsum(length)
    low = high - length
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    shared = shared_segments([p.ancestors for p in pieces], bounds)
    own = np.stack([low, high, slot - past, slot + length, position - past], 1)
    place = np.arange(high[-1]) - np.repeat(low, length)
    positions = np.repeat(position, length) + place
    copy_from, copy_to = (torch.from_numpy(c).to(device) if len(c) else None for c in copies)
    return PackedBatch(
        input_ids=_row(np.concatenate([p.token_ids for p in pieces]), device),
        position_ids=_row(positions, device),
        slots=_row(np.repeat(slot, length) + place, device)[0],
        kernel=kernel,
        work=kernel.prepare(np.concatenate([shared, own]), positions),
        copy_from=copy_from,
        copy_to=copy_to,
    )


def pack_decode(
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    own: tuple[NDArray[np.int64], NDArray[np.int64]],
    before: Segments,
    kernel: AttentionKernel,
    device: torch.device,
) -> PackedBatch:
    """One forward of one new token a row, rows in depth-first order; all arrays [rows] int64.

    `own` is (first slot, last slot + 1) of each row's last block, with the new token's slot as the
    last; `before` are the segments of the nodes above and of the rows' earlier blocks.
    """
    segments = decode_segments(positions, own, before)
    return PackedBatch(
        input_ids=_row(token_ids, device),
        position_ids=_row(positions, device),
        slots=_row(own[1] - 1, device)[0],
        kernel=kernel,
        work=kernel.prepare(segments, positions),
    )


def decode_segments(
    positions: NDArray[np.int64],
    own: tuple[NDArray[np.int64], NDArray[np.int64]],
    before: Segments,
) -> Segments:
    """What decoding rows see: `before`, and each its own last block; see `pack_decode`."""
    low, high = own
    rows = np.arange(len(low))
    own_segments = np.stack([rows, rows + 1, low, high, positions - (high - low) + 1], 1)
    return np.concatenate([before, own_segments])


def shared_segments(
    ancestors: list[tuple[SlotRange, ...]], bounds: list[tuple[int, int]]
) -> Segments:
    """One segment for each shared range, over all the neighbouring queries below it.

    `ancestors[i]` tile the prompt positions before piece i, whose queries are `bounds[i]`.
    """
    segments: list[list[int]] = []
    latest: list[list[int]] = []  # by depth
    for spans, (low, high) in zip(ancestors, bounds, strict=True):
        position = 0
        for depth, (kv_lo, kv_hi) in enumerate(spans):
            if depth < len(latest) and latest[depth][1:3] == [low, kv_lo]:
                latest[depth][1] = high
            else:
                segment = [low, high, kv_lo, kv_hi, position]
                latest[depth : depth + 1] = [segment]
                segments.append(segment)
            position += kv_hi - kv_lo
    return np.array(segments, np.int64).reshape(-1, 5)


def _row(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(0)
