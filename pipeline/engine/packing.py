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
token. Documents are seen by queries of their own, see `views`; those of one document lie side by
side, so that its KV is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.observation import Observer
from pipeline.engine.rotary import Rotary
from pipeline.engine.views import Views


class PlacedSlots(NamedTuple):
    """Slots `[low, high)`, which hold consecutive positions from `position` on."""

    low: int
    high: int
    position: int


class SeenDocuments(NamedTuple):
    """What tokens see of documents. `keys` [documents, 2]: the part that each ends with and the
    position from which on it is seen, the same for what is the same, and neighbours for neighbours
    in the tree; `shifts` [documents]: what a row's positions are more than its own; int64 both.
    `slots(i)` are those of document i, at positions of its own frame."""

    keys: NDArray[np.int64]
    shifts: NDArray[np.int64]
    slots: Callable[[int], tuple[PlacedSlots, ...]]

    def at(self, position: int) -> SeenDocuments:
        """Those that begin in the row at `position` or before."""
        chosen = np.flatnonzero(self.keys[:, 1] + self.shifts <= position)
        if len(chosen) == len(self.shifts):
            return self
        slots = self.slots
        return SeenDocuments(self.keys[chosen], self.shifts[chosen], lambda i: slots(chosen[i]))


NO_DOCUMENTS = SeenDocuments(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), lambda i: ())


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one span: ids [n], first position, first slot, and what they see.

    `past`: as many of the span's tokens lie right before; `above`: what is seen besides, and
    `documents` what of other frames.
    """

    token_ids: NDArray[np.int64]
    position: int
    slot: int
    past: int
    above: tuple[PlacedSlots, ...]
    documents: SeenDocuments = NO_DOCUMENTS

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All that attention needs to know about one forward of N tokens; built once, used per layer.

    `input_ids`, `position_ids` [1, N]; `slots` [N] where new K and V go; `copy_from`, `copy_to`
    slots copied after that write; `work` is the kernel's own description of what each query sees,
    `views` the queries in documents' frames, if any; `observer` notes queries as they pass.
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    kernel: AttentionKernel
    work: Any
    copy_from: Tensor | None = None
    copy_to: Tensor | None = None
    views: Views | None = None
    observer: Observer | None = None


@dataclass(frozen=True, slots=True)
class DocumentSpans:
    """What the tokens of a forward see of documents: `spans` of the queries from the number of
    tokens on, query i being that of token `owner[i]`, `shift[i]` positions back; int64."""

    spans: KVSpans
    owner: NDArray[np.int64]
    shift: NDArray[np.int64]


class Packer:
    """Makes the batches of one engine. `rotary`: turns queries where documents are seen."""

    def __init__(
        self, kernel: AttentionKernel, device: torch.device, rotary: Rotary | None = None
    ) -> None:
        self.kernel = kernel
        self.device = device
        self._rotary = rotary

    def work(
        self, spans: KVSpans, positions: NDArray[np.int64], documents: DocumentSpans | None
    ) -> tuple[Any, Views | None]:
        """The kernel's work on `spans` of the tokens at `positions` and on what they see of
        documents; the views of these."""
        if documents is None:
            return self.kernel.prepare(spans, positions), None
        assert self._rotary is not None, "documents are seen, and nothing can turn queries"
        owner, shift = documents.owner, documents.shift
        work = self.kernel.prepare(
            np.concatenate([spans, documents.spans]),
            np.concatenate([positions, positions[owner] - shift]),
            np.concatenate([np.arange(len(positions)), owner]),
        )
        owner_there, shift_there = (torch.from_numpy(x).to(self.device) for x in (owner, shift))
        return work, Views(owner_there, shift_there, self._rotary)


def pack_prefill(
    pieces: list[Piece], copies: tuple[NDArray[np.int64], NDArray[np.int64]], packer: Packer
) -> PackedBatch:
    """One forward over `pieces`, in depth-first order, with slots `copies` (from, to)."""
    device = packer.device
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
    seen = document_spans([p.documents for p in pieces], bounds)
    work, views = packer.work(np.concatenate([shared, own]), positions, seen)
    return PackedBatch(
        input_ids=_row(np.concatenate([p.token_ids for p in pieces]), device),
        position_ids=_row(positions, device),
        slots=_row(np.repeat(slot, length) + offset, device)[0],
        kernel=packer.kernel,
        work=work,
        copy_from=copy_from,
        copy_to=copy_to,
        views=views,
    )


def pack_decode(
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    own_slots: tuple[NDArray[np.int64], NDArray[np.int64]],
    before: KVSpans,
    packer: Packer,
    documents: DocumentSpans | None = None,
) -> PackedBatch:
    """One forward of one new token a row, rows in depth-first order; all arrays [rows] int64.

    `own_slots` is (first, last + 1) of each row's last block, with the new token's slot as the
    last; `before` are the shared spans above and the rows' earlier blocks.
    """
    device = packer.device
    work, views = packer.work(decode_spans(positions, own_slots, before), positions, documents)
    return PackedBatch(
        input_ids=_row(token_ids, device),
        position_ids=_row(positions, device),
        slots=_row(own_slots[1] - 1, device)[0],
        kernel=packer.kernel,
        work=work,
        views=views,
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


def document_spans(
    seen: list[SeenDocuments], bounds: list[tuple[int, int]]
) -> DocumentSpans | None:
    """`seen[i]` is seen by all tokens of piece i, which are `bounds[i]`; None: nothing is."""
    counts = np.array([len(documents.shifts) for documents in seen])
    if not counts.any():
        return None
    piece = np.repeat(np.arange(len(seen)), counts)
    place = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.concatenate([documents.keys for documents in seen])
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    piece, place, keys = piece[order], place[order], keys[order]
    low, high = np.array(bounds, np.int64)[piece].T
    lengths = high - low
    stop = bounds[-1][1] + np.cumsum(lengths)
    heads = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(1)))
    last = np.append(heads[1:], len(keys)) - 1
    at = list(zip((stop - lengths)[heads].tolist(), stop[last].tolist(), strict=True))
    firsts = zip(piece[heads].tolist(), place[heads].tolist(), strict=True)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shifts = np.concatenate([documents.shifts for documents in seen])[order]
    return DocumentSpans(
        shared_spans([seen[i].slots(j) for i, j in firsts], at),
        np.repeat(low, lengths) + offset,
        np.repeat(shifts, lengths),
    )


def _row(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(0)
