"""Llama and its near relatives, layer by layer, with packed weights and fused CPU kernels.

The same arithmetic as transformers' code in fewer passes over memory: one GEMM for Q, K and V;
rotary embedding, norms of heads and the cache write in one step; activation, gate and residual as
epilogues of the GEMMs. The self-test compares it with the model's own forward at every load.

    x ─ norm ─ [Q K V] ─ rotate, store ─ attend ─ [O] + x ─ norm ─ silu[gate] * [up] ─ [down] + x
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine import blocked_linear
from pipeline.engine.attention import copy_short_edges, window_of
from pipeline.engine.blocked_linear import BlockedGate, BlockedLinear
from pipeline.engine.forward import can_pack
from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packed_linear import PackedGate, PackedLinear
from pipeline.engine.packing import PackedBatch
from pipeline.engine.threads import pooled
from pipeline.model.int8 import Int8Linear

_MLP_TOKENS = 1024  # so few that malloc keeps the memory of the wide activations between calls
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class _Norm:
    """RMS norm: weight [n] float32."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight.float(), module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.coppice.rms_norm(x, self.weight, self.eps)
        return y


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of one decoder layer."""

    attention_norm: _Norm
    qkv: BlockedLinear | PackedLinear
    head_norms: tuple[_Norm, _Norm] | None
    rules: AttentionRules
    output: BlockedLinear | PackedLinear
    mlp_norm: _Norm
    gate_and_up: BlockedGate | PackedGate
    down: BlockedLinear | PackedLinear
    number: int

    @classmethod
    def of(cls, number: int, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            number=number,
            attention_norm=_Norm.of(layer.input_layernorm),
            qkv=_packed(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=(
                (_Norm.of(attention.q_norm), _Norm.of(attention.k_norm))
                if hasattr(attention, "q_norm")
                else None
            ),
            rules=AttentionRules(attention.scaling, window=window_of(attention)),
            output=_packed(attention.o_proj),
            mlp_norm=_Norm.of(layer.post_attention_layernorm),
            gate_and_up=_packed_gate(mlp.gate_proj, mlp.up_proj),
            down=_packed(mlp.down_proj),
        )

    @property
    def is_blocked(self) -> bool:
        """Whether all its products are our own kernels'."""
        linears = (self.qkv, self.output, self.gate_and_up, self.down)
        return all(isinstance(linear, BlockedLinear | BlockedGate) for linear in linears)

    def attend(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], batch: PackedBatch, kv: Tensor
    ) -> Tensor:
        """x [N, hidden] -> [N, Hq d]; `kv` [2, Hkv, capacity, d] is this layer's arena."""
        keys, values = kv
        qkv = self.qkv(self.attention_norm(x))
        query_norm, key_norm = self.head_norms or (None, None)
        torch.ops.coppice.rotate_and_store(
            qkv, *rotation, batch.slots, keys, values,
            query_norm.weight if query_norm else None,
            key_norm.weight if key_norm else None,
            query_norm.eps if query_norm else 0.0,
        )  # fmt: skip
        copy_short_edges(batch, keys, values)
        heads = qkv.view(len(qkv), -1, keys.shape[2])[:, : -2 * keys.shape[0]]
        if batch.observer is not None:
            batch.observer.take(self.number, heads, self.rules)
        if batch.views is not None:
            turn = batch.views.turn_in(self.number)
            assert turn is not None, "all layers of these families have rotary positions"
            heads = torch.ops.coppice.turn_views(heads, batch.views.owner, *turn)
        return batch.kernel.attend(heads, keys, values, batch.work, self.rules).flatten(1)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """[N, Hq d] and [N, hidden] -> [N, hidden], each token by itself."""
        x = self.output.plus(attended, x)
        if len(x) <= _MLP_TOKENS:
            return self._mlp(x)
        return torch.cat([self._mlp(part) for part in torch.split(x, _MLP_TOKENS)])

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down.plus(self.gate_and_up(self.mlp_norm(x)), x)


class NativeForward:
    """See `Forward`. `is_pooled`: it runs on threads of its own (`threads.pooled`)."""

    name = "native"

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.model
        self._embedding = body.embed_tokens
        self._rotary = body.rotary_emb
        self._layers = [*map(_Layer.of, range(len(body.layers)), body.layers)]
        self._norm = _Norm.of(body.norm)
        self._head = _packed(model.lm_head)
        self.is_pooled = isinstance(self._head, BlockedLinear) and all(
            layer.is_blocked for layer in self._layers
        )
        self._threads = pooled if self.is_pooled else nullcontext

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        with self._threads():
            return self._head(self._states(batch, cache, keep))

    def in_pieces(
        self, batch: PackedBatch, cache: KVCache, keep: Tensor, size: int
    ) -> Iterator[Tensor]:
        """See `PiecewiseForward`."""
        with self._threads():
            states = self._states(batch, cache, keep)
        for part in torch.split(states, size):
            with self._threads():
                logits = self._head(part)
            yield logits

    def _states(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        """What the output layer takes."""
        x = self._embedding(batch.input_ids)
        cos, sin = (r[0] for r in self._rotary(x, batch.position_ids))
        x = x[0]
        for layer, kv in zip(self._layers, cache.arena, strict=True):
            attended = layer.attend(x, (cos, sin), batch, kv)
            if layer is self._layers[-1]:  # nothing asks for the other tokens' states
                attended, x = attended[keep], x[keep]
            x = layer.finish(attended, x)
        return self._norm(x)


def knows(config: Any) -> bool:
    """Whether `NativeForward` computes what this config says."""
    return config.model_type in FAMILIES and config.hidden_act == "silu"


def suits(model: PreTrainedModel) -> bool:
    """Whether `NativeForward` knows this model and there is room for its weights."""
    has_kernels = all(blocked_linear.suits(m) for m in model.modules() if isinstance(m, Int8Linear))
    return knows(model.config) and has_kernels and can_pack(model)


def _packed(*linears: Any) -> BlockedLinear | PackedLinear:
    """Their outputs side by side."""
    is_blocked = all(map(blocked_linear.suits, linears))
    return BlockedLinear(*linears) if is_blocked else PackedLinear.of(*linears)


def _packed_gate(gate: Any, up: Any) -> BlockedGate | PackedGate:
    is_blocked = blocked_linear.suits(gate) and blocked_linear.suits(up)
    return BlockedGate(gate, up) if is_blocked else PackedGate(gate, up)
