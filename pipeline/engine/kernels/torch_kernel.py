"""Cascade attention in plain torch, for every device and dtype: where no compiled kernel is.

The host cuts spans into levels (torch_levels.py), a layer runs one after the other and merges what
they give. Views are queries like all others, joined at the end of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels import partial
from pipeline.engine.kernels.rules import AttentionRules, KVSpans
from pipeline.engine.kernels.torch_levels import (
    Bucket,
    Level,
    Mask,
    levels_of_tree,
    levels_of_views,
)

_NOTHING = torch.finfo(torch.float32).min  # the lse of no key: weighs 0 and is no infinity


@dataclass(frozen=True, slots=True)
class TorchWork:
    """Levels of one forward. Without views a query's own past comes first and is never empty.

    `owner` [V - N]: the token of each view, None: there are no views.
    """

    levels: tuple[Level, ...]
    positions: Tensor
    owner: Tensor | None


class TorchKernel:
    """See `AttentionKernel`."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> TorchWork:
        at = torch.from_numpy(positions).to(self._device)
        if owner is None:
            return TorchWork(levels_of_tree(spans, positions, self._device), at, None)
        views = torch.from_numpy(owner[int(owner.max(initial=-1)) + 1 :]).to(self._device)
        return TorchWork(levels_of_views(spans, positions, self._device), at, views)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: TorchWork, rules: AttentionRules
    ) -> Tensor:
        state = _LayerAttention(query, keys.shape[0], rules, work)
        for level in work.levels:
            state.run(level, keys, values)
        return state.result()


class _LayerAttention:
    """Running result of one layer: `out` [Hkv, V, rep, d] and `lse` [Hkv, V, rep], float32."""

    def __init__(
        self, query: Tensor, num_kv_heads: int, rules: AttentionRules, work: TorchWork
    ) -> None:
        tokens, heads, head_dim = query.shape
        grouped = query.reshape(tokens, num_kv_heads, heads // num_kv_heads, head_dim)
        self.query = grouped.transpose(0, 1).contiguous()  # rows of one KV head side by side
        self.rules = rules
        self.positions = work.positions
        self.owner = work.owner
        self.out = torch.empty(self.query.shape, dtype=torch.float32, device=query.device)
        self.lse = torch.empty(self.query.shape[:-1], dtype=torch.float32, device=query.device)
        if work.owner is not None:  # a view may see nothing
            self.out.zero_()
            self.lse.fill_(_NOTHING)

    def run(self, level: Level, k: Tensor, v: Tensor) -> None:
        """Attend the items of `level` to k, v [Hkv, slots, d]."""
        for span in level.singles:
            self._single(span, k, v, level)
        for bucket in level.buckets:
            self._bucket(bucket, k, v, level)

    def result(self) -> Tensor:
        """[N, Hq, d] in the model's dtype."""
        out, lse = self.out, self.lse
        if self.owner is not None:
            out, lse = partial.join(out, lse, self.owner)
        if self.rules.sinks is not None:
            sinks = self.rules.sinks.view(out.shape[0], 1, out.shape[2])
            out = out * torch.sigmoid(lse - sinks).unsqueeze(-1)
        return out.to(self.query.dtype).transpose(0, 1).flatten(1, 2).contiguous()

    def _single(self, span: list[int], k: Tensor, v: Tensor, level: Level) -> None:
        q_lo, q_hi, kv_lo, kv_hi, position = span
        queries, keys = slice(q_lo, q_hi), slice(kv_lo, kv_hi)
        at = torch.arange(position, position + kv_hi - kv_lo, device=k.device)
        now = self.positions[queries].unsqueeze(0)
        bias = self._position_bias(now, at.unsqueeze(0), None, level.mask)
        q = self.query[:, queries].unsqueeze(1)
        out, lse = self._attend(q, k[:, keys].unsqueeze(1), v[:, keys].unsqueeze(1), bias, level)
        if level.is_first:
            self.out[:, queries], self.lse[:, queries] = out[:, 0], lse[:, 0]
        else:
            partial.merge(self.out[:, queries], self.lse[:, queries], out[:, 0], lse[:, 0])

    def _bucket(self, bucket: Bucket, k: Tensor, v: Tensor, level: Level) -> None:
        # Padding at the end is in no query's past.
        hidden = None if level.mask == "causal" else bucket.bias
        now = self.positions[bucket.queries]
        bias = self._position_bias(now, bucket.key_positions, hidden, level.mask)
        keys = bucket.keys
        out, lse = self._attend(self.query[:, bucket.queries], k[:, keys], v[:, keys], bias, level)
        out, lse = out.flatten(1, 2)[:, bucket.source], lse.flatten(1, 2)[:, bucket.source]
        target = bucket.target
        if not level.is_first:
            sofar, sofar_lse = self.out[:, target], self.lse[:, target]
            partial.merge(sofar, sofar_lse, out, lse)
            out, lse = sofar, sofar_lse
        self.out[:, target], self.lse[:, target] = out.float(), lse

    def _position_bias(
        self, queries: Tensor, keys: Tensor, bias: Tensor | None, mask: Mask
    ) -> Tensor | None:
        """Positions [B, M] and [B, L] -> [B, 1, M * rep, L]: -inf where a key is too old, and
        where one comes later if that is the mask."""
        window = self.rules.window
        if not window and mask != "position":
            return bias
        age = queries.unsqueeze(-1) - keys.unsqueeze(-2)
        is_hidden = age >= window if window else age < 0
        if window and mask == "position":
            is_hidden |= age < 0
        old = torch.zeros(age.shape, device=keys.device).masked_fill(is_hidden, float("-inf"))
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
        if level.mask == "causal" and is_plain:
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
        if level.mask == "causal":
            ahead = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            future = torch.zeros(ahead.shape, device=q.device).masked_fill(ahead, float("-inf"))
            future = future.repeat_interleave(rep, 0)
            bias = future if bias is None else bias + future
        if is_plain and level.mask != "position":
            out, lse = partial.dense(folded, k, v, rules.scale, bias)
        else:
            out, lse = partial.dense_reference(folded, k, v, rules.scale, bias, rules.softcap)
        return out.view(*shape, -1).transpose(0, 1), lse.view(shape).transpose(0, 1)
