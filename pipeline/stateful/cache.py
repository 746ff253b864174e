"""KV of a group of streams that go on in step, each token by its number: slow, plain, explicit.

Keys are kept as they come from their projection and turned at every forward to where they stand
now, so that nothing of the engine's views is needed, nor tested, here. All streams of a group hold
as many tokens as each other; which ones may differ, by layer and head as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.engine.eviction import OBSERVED
from pipeline.engine.health import Standing, measure
from pipeline.engine.rotary import Rotary
from pipeline.stateful.arms import Positions

_MOST_POSITIONS = 4096


@dataclass
class Seen:
    """Attention that the tokens of a cache got, [B, L, H, n]: `newest` of the last query, `window`
    mean of the last queries of a prefill, `sums` of all with `queries` that could see them."""

    newest: Tensor
    window: Tensor
    sums: Tensor
    queries: Tensor

    def of(self, evictor: str) -> Tensor:
        """[B, n], or [B, L, H, n]: what an evictor goes by."""
        if evictor == "attention-top":
            return self.newest.mean((1, 2))
        return self.window if evictor == "snapkv" else self.sums / self.queries


@dataclass
class Cache:
    """`keys`, `values` by layer [B, H, n, d], not turned; `number`, `born` [B, L, H, n]: of a token
    in its stream, and where it stood when it came. `positions`: "gap", "rerotate" or "stale".
    `weighs`: what tokens get of attention is noted in `seen`."""

    model: Any
    rows: int
    positions: Positions
    weighs: bool = True
    computed: int = 0
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)
    number: Tensor = field(init=False)
    born: Tensor = field(init=False)
    seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        width = self.model.base_model.layers[0].self_attn.head_dim
        self.keys = [torch.zeros(self.rows, heads, 0, width) for _ in range(layers)]
        self.values = [keys.clone() for keys in self.keys]
        self.number = torch.zeros(self.rows, layers, heads, 0, dtype=torch.int64)
        self.born = self.number.clone()
        self.seen = Seen(*(torch.zeros(self.number.shape) for _ in range(4)))
        rotary, places = Rotary.of(self.model), torch.arange(_MOST_POSITIONS)
        turns = [rotary.cos_sin(layer, places) for layer in range(layers)]
        self._turns = [turn for turn in turns if turn is not None]

    @property
    def held(self) -> int:
        """Tokens of a stream that are there."""
        return self.number.shape[-1]

    @property
    def next_position(self) -> int:
        """Where the next token will stand."""
        return self.computed if self.positions == "gap" else self.held

    def stands(self) -> Tensor:
        """[B, L, H, n] where the kept keys stand."""
        if self.positions == "rerotate":
            return torch.arange(self.held).expand(self.number.shape)
        return self.number if self.positions == "gap" else self.born

    def standing(self) -> Standing:
        """The worst of all streams."""
        shape = (-1 if self.held else 0, self.number.shape[2], self.held)
        at, number = (x.numpy().reshape(shape) for x in (self.stands(), self.number))
        return measure(at, self.next_position, number)

    @torch.inference_mode()
    def feed(self, ids: Tensor, is_prefill: bool) -> Tensor:
        """Logits [B, V] behind the last of new tokens [B, m]; they are kept."""
        count = ids.shape[1]
        self._append(count)
        stands = self.stands()
        hidden = self.model.get_input_embeddings()(ids)
        weights = []
        for i, layer in enumerate(self.model.base_model.layers):
            mixed, seen = self._attend(i, layer.input_layernorm(hidden), stands[:, i])
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            weights.append(seen)
        if self.weighs:
            self._note(torch.stack(weights, 1), is_prefill)
        logits: Tensor = self.model.lm_head(self.model.base_model.norm(hidden[:, -1]))
        return logits

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """[B, n] or [B, L, H, n], as many everywhere."""
        spread = kept[:, None, None] if kept.ndim == 2 else kept
        mask = torch.from_numpy(np.broadcast_to(spread, tuple(self.number.shape)).copy())
        index = mask.nonzero()[:, -1].view(*self.number.shape[:3], -1)
        for i in range(len(self.keys)):
            at = index[:, i, :, :, None].expand(-1, -1, -1, self.keys[i].shape[-1])
            self.keys[i], self.values[i] = self.keys[i].gather(2, at), self.values[i].gather(2, at)
        self.number, self.born = self.number.gather(3, index), self.born.gather(3, index)
        seen = self.seen
        if not self.weighs:
            return
        self.seen = Seen(
            *(x.gather(3, index) for x in (seen.newest, seen.window, seen.sums, seen.queries))
        )

    def _append(self, count: int) -> None:
        """Numbers and places of new tokens."""
        shape = (*self.number.shape[:3], count)
        new = torch.arange(count)
        numbers = (new + self.computed).expand(shape)
        born = (new + self.next_position).expand(shape)
        self.number = torch.cat([self.number, numbers], 3)
        self.born = torch.cat([self.born, born], 3)
        self.computed += count

    def _attend(self, i: int, normed: Tensor, stands: Tensor) -> tuple[Tensor, Tensor]:
        """What attention of layer `i` adds [B, m, hidden], and its weights [B, H, m, n], mean over
        the query heads of each KV head, or nothing."""
        attention = self.model.base_model.layers[i].self_attn
        heads, width = self.keys[i].shape[1], self.keys[i].shape[-1]
        rows, count = normed.shape[:2]
        query, key, value = (
            part(normed).view(rows, count, -1, width).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.keys[i] = torch.cat([self.keys[i], key], 2)
        self.values[i] = torch.cat([self.values[i], value], 2)
        keys = self._turn(i, self.keys[i], stands)
        query = query.reshape(rows, heads, -1, width)  # query heads of a KV head, one after another
        at = stands[..., -count:].repeat(1, 1, query.shape[2] // count)
        query, total = self._turn(i, query, at), keys.shape[2]
        sees = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        if self.weighs:
            scores = (query @ keys.mT * attention.scaling).view(rows, heads, -1, count, total)
            weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
            mixed, seen = weights.flatten(2, 3) @ self.values[i], weights.mean(2)
        else:
            mask = sees.repeat(query.shape[2] // count, 1)
            mixed = functional.scaled_dot_product_attention(
                query, keys, self.values[i], mask, scale=attention.scaling
            )
            seen = keys[:0]
        mixed = mixed.view(rows, -1, count, width).transpose(1, 2).reshape(rows, count, -1)
        return attention.o_proj(mixed), seen

    def _turn(self, layer: int, heads: Tensor, stands: Tensor) -> Tensor:
        """heads [B, H, n, d] turned to `stands` [B, H, n]."""
        cos, sin = (x[stands] for x in self._turns[layer])
        a, b = heads.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _note(self, weights: Tensor, is_prefill: bool) -> None:
        """weights [B, L, H, m, n] of one forward."""
        count, old = weights.shape[3], self.seen
        more = torch.zeros(*self.number.shape[:3], count)
        window, sums, queries = (
            torch.cat([x, more], 3) for x in (old.window, old.sums, old.queries)
        )
        if is_prefill:
            window = weights[..., -OBSERVED:, :].mean(3)
        could_see = torch.full((weights.shape[-1],), float(count))
        could_see[-count:] = torch.arange(count, 0, -1)
        self.seen = Seen(weights[..., -1, :], window, sums + weights.sum(3), queries + could_see)
