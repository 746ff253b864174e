"""The attention function that transformers calls in each layer. Knows slots, not prompts.

Registered under a name that triggers none of transformers' special paths, so masks are never made
and causality is ours: a forward without our `packed_batch` is refused (engine.md §3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pipeline.engine.kernels import partial
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import Bucket, DenseItem, Level, PackedBatch
from pipeline.errors import EngineError

ATTENTION_NAME = "coppice_tree"


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_batch: PackedBatch | None = None,
    kv_cache: KVCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new K and V, then attend along each token's own path of the tree.

    query [1, Hq, N, d]; key, value [1, Hkv, N, d], after rotary, not repeated. Returns
    ([1, N, Hq, d], None). Raises EngineError when called by anything but our engines.
    """
    if packed_batch is None or kv_cache is None:
        raise EngineError("tree attention was called without a packed batch; use coppice's engine")
    layer = kv_cache.arena[int(module.layer_idx)]  # type: ignore[arg-type]
    layer[0].index_copy_(1, packed_batch.slots, key[0])
    layer[1].index_copy_(1, packed_batch.slots, value[0])
    if packed_batch.copy_from is not None:
        layer[:, :, packed_batch.copy_to] = layer[:, :, packed_batch.copy_from]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state = _LayerAttention(query[0], key.shape[1], scale)
    if packed_batch.base_is_causal:
        state.run(packed_batch.base, key[0], value[0], causal=True, is_first=True)
    else:
        state.run(packed_batch.base, layer[0], layer[1], causal=False, is_first=True)
    for level in packed_batch.levels:
        state.run(level, layer[0], layer[1], causal=False, is_first=False)
    return state.result(), None


class _LayerAttention:
    """Running result of one layer: `out` [Hkv, N, rep, d] and `lse` [Hkv, N, rep], float32."""

    def __init__(self, query: Tensor, num_kv_heads: int, scale: float) -> None:
        heads, tokens, head_dim = query.shape
        grouped = query.view(num_kv_heads, heads // num_kv_heads, tokens, head_dim)
        self.query = grouped.transpose(1, 2).contiguous()  # rows of one KV head side by side
        self.scale = scale
        self.out = torch.empty(self.query.shape, dtype=torch.float32, device=query.device)
        self.lse = torch.empty(self.query.shape[:-1], dtype=torch.float32, device=query.device)

    def run(self, level: Level, k: Tensor, v: Tensor, *, causal: bool, is_first: bool) -> None:
        """Attend the items of `level` to k, v [Hkv, slots, d]; the first level is assigned."""
        for item in level.singles:
            self._single(item, k, v, causal, is_first)
        for bucket in level.buckets:
            self._bucket(bucket, k, v, causal, is_first)

    def result(self) -> Tensor:
        """[1, N, Hq, d] in the model's dtype."""
        out = self.out.to(self.query.dtype).transpose(0, 1)
        return out.flatten(1, 2).contiguous().unsqueeze(0)

    def _single(self, item: DenseItem, k: Tensor, v: Tensor, causal: bool, is_first: bool) -> None:
        queries, keys = slice(item.q_lo, item.q_hi), slice(item.kv_lo, item.kv_hi)
        q = self.query[:, queries].unsqueeze(1)
        out, lse = self._attend(q, k[:, keys].unsqueeze(1), v[:, keys].unsqueeze(1), None, causal)
        if is_first:
            self.out[:, queries], self.lse[:, queries] = out[:, 0], lse[:, 0]
        else:
            partial.merge(self.out[:, queries], self.lse[:, queries], out[:, 0], lse[:, 0])

    def _bucket(self, bucket: Bucket, k: Tensor, v: Tensor, causal: bool, is_first: bool) -> None:
        bias = None if causal else bucket.bias  # padding at the end is in no query's past
        keys = bucket.keys
        out, lse = self._attend(self.query[:, bucket.queries], k[:, keys], v[:, keys], bias, causal)
        out, lse = out.flatten(1, 2)[:, bucket.source], lse.flatten(1, 2)[:, bucket.source]
        target = bucket.target
        if not is_first:
            sofar, sofar_lse = self.out[:, target], self.lse[:, target]
            partial.merge(sofar, sofar_lse, out, lse)
            out, lse = sofar, sofar_lse
        self.out[:, target], self.lse[:, target] = out.float(), lse

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q [Hkv, B, M, rep, d]; k, v [Hkv, B, L, d] -> out as q, lse [Hkv, B, M, rep]."""
        queries, rep = q.shape[2:4]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if not causal:
            # All query heads of a KV head become rows of one product: K and V are read once.
            folded = q.flatten(2, 3).transpose(0, 1)
            out, lse = partial.dense(folded, k, v, self.scale, bias)
            shape = (q.shape[0], q.shape[1], queries, rep)
            return out.transpose(0, 1).view(*shape, -1), lse.transpose(0, 1).view(shape)
        by_head = q.permute(1, 3, 0, 2, 4).flatten(0, 1)
        k, v = (x.unsqueeze(1).expand(-1, rep, -1, -1, -1).flatten(0, 1) for x in (k, v))
        out, lse = partial.causal(by_head, k, v, self.scale)
        shape = (q.shape[1], rep, q.shape[0], queries)
        return (
            out.view(*shape, -1).permute(2, 0, 3, 1, 4),
            lse.view(shape).permute(2, 0, 3, 1),
        )


AttentionInterface.register(ATTENTION_NAME, tree_attention)
