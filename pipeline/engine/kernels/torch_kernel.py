"""Cascade attention in plain torch, for every device and dtype: where no compiled kernel is.

KVSpans become *levels*: within a level no query occurs twice, so its results can be merged into
the running ones at once. A large span is a GEMM of its own, small ones share padded GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels import partial
from pipeline.engine.kernels.rules import AttentionRules, KVSpans

_BUCKET_CELLS = 1 << 16  # query x key pairs above which an item fills the device alone
_BUCKET_KEYS = 512  # keys above which gathering them costs more than a call of its own
_PADDED_CELLS = 1 << 24  # padded query x key pairs of one bucket: bounds its memory


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
    is_causal: bool
    is_first: bool
    """Its queries have no result yet."""


@dataclass(frozen=True, slots=True)
class TorchWork:
    """Levels of one forward; a query's own past comes first and is never empty."""

    levels: tuple[Level, ...]
    positions: Tensor


class TorchKernel:
    """See `AttentionKernel`."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, spans: KVSpans, positions: NDArray[np.int64]) -> TorchWork:
        """Each query's own past first, causally, then the shared ranges above it."""
        own, causal, shared = _split_at_diagonal(spans, positions)
        levels = [(own, False, True), (causal, True, True)]
        levels += [(level, False, False) for level in _levels(shared, len(positions))]
        return TorchWork(
            tuple(make_level(*level, self._device) for level in levels if len(level[0])),
            torch.from_numpy(positions).to(self._device),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: TorchWork, rules: AttentionRules
    ) -> Tensor:
        state = _LayerAttention(query, keys.shape[0], rules, work.positions)
        for level in work.levels:
            state.run(level, keys, values)
        return state.result()


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


def _levels(spans: KVSpans, num_tokens: int) -> list[KVSpans]:
    """KVSpans by depth: the one nearest the root first."""
    seen = np.zeros(num_tokens, np.int64)
    depth = np.empty(len(spans), np.int64)
    for index in np.argsort(spans[:, 4], kind="stable").tolist():
        q_lo, q_hi = spans[index, 0], spans[index, 1]
        depth[index] = seen[q_lo]
        seen[q_lo:q_hi] += 1
    return [spans[depth == d] for d in range(int(depth.max(initial=-1)) + 1)]


def make_level(spans: KVSpans, is_causal: bool, is_first: bool, device: torch.device) -> Level:
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
    return Level(spans[is_single].tolist(), tuple(buckets), is_causal, is_first)


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


class _LayerAttention:
    """Running result of one layer: `out` [Hkv, N, rep, d] and `lse` [Hkv, N, rep], float32."""

    def __init__(
        self, query: Tensor, num_kv_heads: int, rules: AttentionRules, positions: Tensor
    ) -> None:
        tokens, heads, head_dim = query.shape
        grouped = query.reshape(tokens, num_kv_heads, heads // num_kv_heads, head_dim)
        self.query = grouped.transpose(0, 1).contiguous()  # rows of one KV head side by side
        self.rules = rules
        self.positions = positions
        self.out = torch.empty(self.query.shape, dtype=torch.float32, device=query.device)
        self.lse = torch.empty(self.query.shape[:-1], dtype=torch.float32, device=query.device)

    def run(self, level: Level, k: Tensor, v: Tensor) -> None:
        """Attend the items of `level` to k, v [Hkv, slots, d]."""
        for span in level.singles:
            self._single(span, k, v, level)
        for bucket in level.buckets:
            self._bucket(bucket, k, v, level)

    def result(self) -> Tensor:
        """[N, Hq, d] in the model's dtype."""
        out = self.out
        if self.rules.sinks is not None:
            sinks = self.rules.sinks.view(out.shape[0], 1, out.shape[2])
            out = out * torch.sigmoid(self.lse - sinks).unsqueeze(-1)
        return out.to(self.query.dtype).transpose(0, 1).flatten(1, 2).contiguous()

    def _single(self, span: list[int], k: Tensor, v: Tensor, level: Level) -> None:
        q_lo, q_hi, kv_lo, kv_hi, position = span
        queries, keys = slice(q_lo, q_hi), slice(kv_lo, kv_hi)
        at = torch.arange(position, position + kv_hi - kv_lo, device=k.device)
        bias = self._window_bias(self.positions[queries].unsqueeze(0), at.unsqueeze(0), None)
        q = self.query[:, queries].unsqueeze(1)
        out, lse = self._attend(q, k[:, keys].unsqueeze(1), v[:, keys].unsqueeze(1), bias, level)
        if level.is_first:
            self.out[:, queries], self.lse[:, queries] = out[:, 0], lse[:, 0]
        else:
            partial.merge(self.out[:, queries], self.lse[:, queries], out[:, 0], lse[:, 0])

    def _bucket(self, bucket: Bucket, k: Tensor, v: Tensor, level: Level) -> None:
        # Padding at the end is in no query's past.
        hidden = None if level.is_causal else bucket.bias
        bias = self._window_bias(self.positions[bucket.queries], bucket.key_positions, hidden)
        keys = bucket.keys
        out, lse = self._attend(self.query[:, bucket.queries], k[:, keys], v[:, keys], bias, level)
        out, lse = out.flatten(1, 2)[:, bucket.source], lse.flatten(1, 2)[:, bucket.source]
        target = bucket.target
        if not level.is_first:
            sofar, sofar_lse = self.out[:, target], self.lse[:, target]
            partial.merge(sofar, sofar_lse, out, lse)
            out, lse = sofar, sofar_lse
        self.out[:, target], self.lse[:, target] = out.float(), lse

    def _window_bias(self, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor | None:
        """Positions [B, M] and [B, L] -> [B, 1, M * rep, L]: -inf where a key is too old."""
        if not self.rules.window:
            return bias
        too_old = queries.unsqueeze(-1) - keys.unsqueeze(-2) >= self.rules.window
        old = torch.zeros(too_old.shape, device=keys.device).masked_fill(too_old, float("-inf"))
        old = old.repeat_interleave(self.query.shape[2], 1).unsqueeze(1)
        return old if bias is None else old + bias

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, level: Level
    ) -> tuple[Tensor, Tensor]:
        """q [Hkv, B, M, rep, d]; k, v [Hkv, B, L, d] -> out as q, lse [Hkv, B, M, rep]."""
        rules, (queries, rep) = self.rules, q.shape[2:4]
        is_plain = not rules.window and not rules.softcap
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        shape = (q.shape[1], q.shape[0], queries, rep)
        if level.is_causal and is_plain:
            by_head = q.permute(1, 3, 0, 2, 4).flatten(0, 1)
            k, v = (x.unsqueeze(1).expand(-1, rep, -1, -1, -1).flatten(0, 1) for x in (k, v))
            out, lse = partial.causal(by_head, k, v, rules.scale)
            shape = (q.shape[1], rep, q.shape[0], queries)
            return (
                out.view(*shape, -1).permute(2, 0, 3, 1, 4),
                lse.view(shape).permute(2, 0, 3, 1),
            )
        # All query heads of a KV head become rows of one GEMM: K and V are read once.
        folded = q.flatten(2, 3).transpose(0, 1)
        if level.is_causal:
            ahead = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            future = torch.zeros(ahead.shape, device=q.device).masked_fill(ahead, float("-inf"))
            future = future.repeat_interleave(rep, 0)
            bias = future if bias is None else bias + future
        if is_plain:
            out, lse = partial.dense(folded, k, v, rules.scale, bias)
        else:
            out, lse = partial.dense_reference(folded, k, v, rules.scale, bias, rules.softcap)
        return out.view(*shape, -1).transpose(0, 1), lse.view(shape).transpose(0, 1)
