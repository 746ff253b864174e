"""Llama and its relatives on a GPU, layer by layer, with merged weights and fused Triton programs.

transformers' own code starts 42 kernels a layer, of which three are attention and seven products;
on a fast card the others cost as much as attention. Here a layer starts at most eleven:

    join ─ [Q K V] ─ rotate and store ─ attend (3) ─ [O] ─ join ─ [gate up] ─ gate ─ [down]

It is the shape of `native_forward` on a CPU. The self-test compares it with the model's own
attention and layers at every load.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine.attention import copy_short_edges
from pipeline.engine.decoder import Decoder, DecoderLayer
from pipeline.engine.kernels import layer_steps
from pipeline.engine.kernels.layer_rules import Heads, Joint, Place, Turn, Viewing
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.errors import EngineError


class TritonForward:
    """See `Forward` and `PiecewiseForward`. Asks for a model that `decoder.why_unknown` knows."""

    name = "triton"

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder = Decoder(model)
        self._heads = int(model.config.num_attention_heads)

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        return self._decoder.logits(self._states(batch, cache, keep))

    def in_pieces(
        self, batch: PackedBatch, cache: KVCache, keep: Tensor, size: int
    ) -> Iterator[Tensor]:
        """See `PiecewiseForward`."""
        yield from map(self._decoder.logits, torch.split(self._states(batch, cache, keep), size))

    def _states(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        """What the output layer takes: of the positions `keep` alone."""
        decoder = self._decoder
        x = decoder.embed(batch.input_ids)
        turns = decoder.turns(x, batch.position_ids)
        states = layer_steps.join(x, None, Joint(decoder.first))
        for layer, (keys, values) in zip(decoder.layers, cache.arena, strict=True):
            place = Place(keys, values, batch.slots)
            y = self._attend(layer, states, turns, batch, place)
            states = layer_steps.join(x, y, layer.to_mlp)
            y = layer.down(layer_steps.gate(layer.gate_and_up(states), layer.activation))
            is_last = layer is decoder.layers[-1]
            states = layer_steps.join(x, y, layer.to_next, keep if is_last else None)
        return states

    def _attend(
        self,
        layer: DecoderLayer,
        states: Tensor,
        turns: dict[str, Turn],
        batch: PackedBatch,
        place: Place,
    ) -> Tensor:
        """What attention adds to each token, [N, hidden]."""
        kv_heads, _, head_dim = place.keys.shape
        qkv, number = layer.qkv(states), layer.number
        if qkv.shape[1] != (self._heads + 2 * kv_heads) * head_dim:
            raise EngineError(
                f"layer {number} made {qkv.shape[1]} numbers of Q, K and V, but the model's config "
                f"promised {self._heads} heads and {kv_heads} of KV x {head_dim}"
            )
        turn = None if layer.turned_by is None else turns[layer.turned_by]
        pairs = head_dim // 2 if turn is None else turn[0].shape[1] // 2
        viewing = None
        if batch.views is not None:
            viewing = Viewing(batch.views.owner, batch.views.turn_in(number))
        heads = Heads(layer.head_norms, turn, pairs)
        query = layer_steps.rotate_and_store(qkv, heads, place, viewing)
        copy_short_edges(batch, place.keys, place.values)
        if batch.observer is not None:
            batch.observer.take(number, query[: len(qkv)], layer.rules)
        attended = batch.kernel.attend(query, place.keys, place.values, batch.work, layer.rules)
        return layer.output(attended.flatten(1))
