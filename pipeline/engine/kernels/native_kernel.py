"""Cascade attention by the compiled CPU kernel: spans cut into tiles of neighbouring queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels import native
from pipeline.engine.kernels.rules import AttentionRules, KVSpans, sort_by_owner
from pipeline.engine.sampling import Sampled

Tiles = NDArray[np.int64]
"""[tiles, 4]: queries `[q_lo, q_hi)` and their spans `[span_lo, span_hi)`."""

_MOST_ROWS = 512  # of a tile: its keys are packed once, and its sums stay in a core's cache
_FEWEST_ROWS = 32  # below, a GEMM costs more than it computes
_STEP_TOKENS = 16  # tiles are multiples of it, so that no GEMM has a few rows left over
_TASKS_A_THREAD = 4  # so that no thread waits long for the last one


@dataclass(frozen=True, slots=True)
class NativeWork:
    """`positions` [V], `spans` [S, 5], `tiles` [T, 4], all int64, in the order of the tiles.

    Where there are views, those of token t are `views[offsets[t] : offsets[t + 1]]`, its own query
    among them.
    """

    positions: Tensor
    spans: Tensor
    tiles: Tensor
    offsets: Tensor | None = None
    views: Tensor | None = None


class NativeKernel:
    """See `AttentionKernel`. For bfloat16 and float32 on a CPU where the library is loaded."""

    name = "native"

    def __init__(self, num_heads: int, num_kv_heads: int, way: str | None = None) -> None:
        """`way` to multiply bfloat16 (`native.ways_of_bfloat16`); None: the fastest one."""
        self._rep = num_heads // num_kv_heads
        self._num_kv_heads = num_kv_heads
        self._way = way or native.way_of_bfloat16()

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> NativeWork:
        """Cut spans at the borders of tiles that keep all threads busy."""
        cut, tiles = cut_tiles(spans, len(positions), self._tile_tokens(len(positions)))
        by_owner = () if owner is None else sort_by_owner(owner)
        return NativeWork(*(torch.from_numpy(x) for x in (positions, cut, tiles, *by_owner)))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: NativeWork, rules: AttentionRules
    ) -> Tensor:
        told = (
            query, keys, values, work.positions, work.spans, work.tiles,
            rules.scale, rules.window, rules.softcap,
        )  # fmt: skip
        if work.offsets is None:
            out: Tensor = torch.ops.coppice.cascade_attention(*told, rules.sinks, self._way)
            return out
        parts, lse = torch.ops.coppice.attend_views(*told, self._way)
        is_bfloat16 = query.dtype == torch.bfloat16
        out = torch.ops.coppice.join_views(
            parts, lse, work.offsets, work.views, rules.sinks, is_bfloat16
        )
        return out

    def _tile_tokens(self, num_tokens: int) -> int:
        threads = torch.get_num_threads()
        wanted = -(-_TASKS_A_THREAD * threads // self._num_kv_heads)
        rows = num_tokens * self._rep
        num_tiles = max(-(-rows // _MOST_ROWS), min(wanted, rows // _FEWEST_ROWS), 1)
        even = threads // math.gcd(threads, self._num_kv_heads)  # as many tasks for each thread
        num_tiles = -(-num_tiles // even) * even
        return -(-num_tokens // (num_tiles * _STEP_TOKENS)) * _STEP_TOKENS


def likeliest_token(logits: Tensor) -> Sampled:
    """As the one of `sampling`, in one pass. logits [rows, V], bfloat16 or float32."""
    best, token_ids = torch.ops.coppice.largest_of_rows(logits.contiguous())
    return Sampled(token_ids.numpy(), best.isfinite().numpy())


def cut_tiles(spans: KVSpans, num_tokens: int, tile_tokens: int) -> tuple[KVSpans, Tiles]:
    """(spans that lie within one tile each, sorted by tile; tiles of `tile_tokens` queries)."""
    first = spans[:, 0] // tile_tokens
    pieces = (spans[:, 1] - 1) // tile_tokens - first + 1
    source = np.repeat(np.arange(len(spans)), pieces)
    tile = first[source] + np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = spans[source]
    cut[:, 0] = np.maximum(cut[:, 0], tile * tile_tokens)
    cut[:, 1] = np.minimum(cut[:, 1], (tile + 1) * tile_tokens)
    cut, tile = _join(cut, tile)
    q_lo = np.arange(0, num_tokens, tile_tokens)
    bounds = np.searchsorted(tile, np.arange(len(q_lo) + 1))
    q_hi = np.minimum(q_lo + tile_tokens, num_tokens)
    return cut, np.stack([q_lo, q_hi, bounds[:-1], bounds[1:]], 1)


def _join(spans: KVSpans, tile: NDArray[np.int64]) -> tuple[KVSpans, NDArray[np.int64]]:
    """Sorted by tile [S]; spans of the same queries whose slots and positions go on are one.

    A conversation's turns lie so: one GEMM of all of them beats many of a few keys.
    """
    order = np.lexsort((spans[:, 2], spans[:, 1], spans[:, 0], tile))
    spans, tile = spans[order], tile[order]
    q_lo, q_hi, kv_lo, kv_hi, position = spans.T
    same = np.stack([tile, q_lo, q_hi, position - kv_lo])
    is_first = np.ones(len(spans), bool)
    is_first[1:] = (same[:, 1:] != same[:, :-1]).any(0) | (kv_lo[1:] != kv_hi[:-1])
    joined = spans[is_first]
    joined[:, 3] = kv_hi[np.roll(is_first, -1)]
    return joined, tile[is_first]
