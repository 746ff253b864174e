"""From the spans of a forward to what plain torch does at once: levels, which hold buckets.

Within a *level* no query occurs twice, so its results can be merged into the running ones at once.
A large span is a GEMM of its own, small ones share padded GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import KVSpans

_BUCKET_CELLS = 1 << 16  # query x key pairs above which an item fills the device alone
_BUCKET_KEYS = 512  # keys above which gathering them costs more than a call of its own
_PADDED_CELLS = 1 << 24  # padded query x key pairs of one bucket: bounds its memory

Mask = Literal["none", "causal", "position"]
"""Which keys of a span its queries see, windows apart: all of them; query i keys 0 .. i; those
that do not come after it."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Small spans done as one padded GEMM.

    `queries` [B, M] and `keys` [B, L] index tokens and slots, `key_positions` [B, L] prompt
    positions; a padded key repeats a valid slot (so that its value is finite) and `bias`
    [B, 1, 1, L] hides it. `source`, `target`: which of the B * M results belong to which tokens.
    """

    queries: Tensor
    keys: Tensor
    key_positions: Tensor
    bias: Tensor | None
    source: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """KVSpans whose queries do not overlap: large ones on their own, small ones in buckets."""

    singles: list[list[int]]
    buckets: tuple[Bucket, ...]
    mask: Mask
    is_first: bool
    """Its queries have no result yet."""


def levels_of_tree(
    spans: KVSpans, positions: NDArray[np.int64], device: torch.device
) -> tuple[Level, ...]:
    """Each query's own past first, causally, then the shared ranges above it."""
    own, causal, shared = _split_at_diagonal(spans, positions)
    levels: list[tuple[KVSpans, Mask, bool]] = [(own, "none", True), (causal, "causal", True)]
    levels += [(level, "none", False) for level in _by_depth(shared, len(positions))]
    return tuple(_level(*level, device) for level in levels if len(level[0]))


def levels_of_views(
    spans: KVSpans, positions: NDArray[np.int64], device: torch.device
) -> tuple[Level, ...]:
    """Wherever queries stand, and where some of them see nothing."""
    return tuple(
        _level(level, mask, False, device)
        for mask, those in _split_by_mask(spans, positions).items()
        for level in _by_depth(those, len(positions))
        if len(level)
    )


def _split_at_diagonal(
    spans: KVSpans, positions: NDArray[np.int64]
) -> tuple[KVSpans, KVSpans, KVSpans]:
    """(single queries with their own range, causal blocks, spans that all their queries see).

    A span that holds its queries' own tokens is cut where those begin.
    """
    first = positions[spans[:, 0]]
    length = spans[:, 3] - spans[:, 2]
    holds_own = spans[:, 4] + length > first
    is_single = holds_own & (spans[:, 1] - spans[:, 0] == 1)
    block = spans[holds_own & ~is_single]
    before = first[holds_own & ~is_single] - block[:, 4]
    causal, past = block.copy(), block.copy()
    causal[:, 2] += before
    causal[:, 4] += before
    past[:, 3] = causal[:, 2]
    past = past[before > 0]
    return spans[is_single], causal, np.concatenate([spans[~holds_own], past])


def _split_by_mask(spans: KVSpans, positions: NDArray[np.int64]) -> dict[Mask, KVSpans]:
    """The same, wherever the queries of a span stand, each row in the kind that costs least.

    What comes after all of a span's queries is left out.
    """
    bounds = spans[:, :2].ravel()
    bounded = np.append(positions, 0)  # `reduceat` takes no index past the end
    first, last = (reduce.reduceat(bounded, bounds)[::2] for reduce in (np.minimum, np.maximum))
    cut = spans.copy()
    cut[:, 3] = np.minimum(spans[:, 3], spans[:, 2] - spans[:, 4] + last + 1)
    end = cut[:, 4] + cut[:, 3] - cut[:, 2]  # the position after the last key
    steps = np.append(0, np.cumsum(np.diff(positions) == 1))
    is_run = steps[cut[:, 1] - 1] - steps[cut[:, 0]] == cut[:, 1] - cut[:, 0] - 1
    is_seen = (end > cut[:, 4]) & (end <= first + 1)
    is_causal = ~is_seen & is_run & (cut[:, 4] <= first) & (end == last + 1)
    causal, past = cut[is_causal].copy(), cut[is_causal].copy()
    before = (first - cut[:, 4])[is_causal]
    causal[:, 2] += before
    causal[:, 4] += before
    past[:, 3] = causal[:, 2]
    return {
        "none": np.concatenate([cut[is_seen], past[before > 0]]),
        "causal": causal,
        "position": cut[(end > cut[:, 4]) & ~is_seen & ~is_causal],
    }


def _by_depth(spans: KVSpans, num_tokens: int) -> list[KVSpans]:
    """KVSpans by depth: the one nearest the root first."""
    seen = np.zeros(num_tokens, np.int64)
    depth = np.empty(len(spans), np.int64)
    for index in np.argsort(spans[:, 4], kind="stable").tolist():
        q_lo, q_hi = spans[index, 0], spans[index, 1]
        depth[index] = seen[q_lo:q_hi].max()
        seen[q_lo:q_hi] = depth[index] + 1
    return [spans[depth == d] for d in range(int(depth.max(initial=-1)) + 1)]


def _level(spans: KVSpans, mask: Mask, is_first: bool, device: torch.device) -> Level:
    """Split spans into singles and buckets of similar shape."""
    queries, keys = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
    is_single = (queries * keys > _BUCKET_CELLS) | (keys > _BUCKET_KEYS)
    small = spans[~is_single]
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
    return Level(spans[is_single].tolist(), tuple(buckets), mask, is_first)


def _grade(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round up to a quarter of a power of two: padding stays below a third."""
    step = 1 << np.maximum(0, np.frexp(lengths - 1.0)[1] - 2).astype(np.int64)
    graded: NDArray[np.int64] = -(-lengths // step) * step
    return graded


def _bucket(spans: KVSpans, device: torch.device) -> Bucket:
    q_lo, q_hi, kv_lo, kv_hi, position = (spans[:, i : i + 1] for i in range(5))
    queries = q_lo + np.arange((q_hi - q_lo).max())
    valid = np.flatnonzero(queries < q_hi)
    queries = np.minimum(queries, q_hi - 1)
    offset = np.arange((kv_hi - kv_lo).max())
    hidden = kv_lo + offset >= kv_hi
    bias = np.where(hidden, -np.inf, 0.0).astype(np.float32)[:, None, None, :]
    return Bucket(
        queries=torch.from_numpy(queries).to(device),
        keys=torch.from_numpy(np.minimum(kv_lo + offset, kv_hi - 1)).to(device),
        key_positions=torch.from_numpy(position + offset).to(device),
        bias=torch.from_numpy(bias).to(device) if hidden.any() else None,
        source=torch.from_numpy(valid).to(device),
        target=torch.from_numpy(queries.ravel()[valid]).to(device),
    )
