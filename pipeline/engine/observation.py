"""How much attention kept tokens get: queries of a forward, and softmax over exactly these keys.

Kernels give no weights. Evictors that go by them, and the health of every eviction, ask for those
of a few queries; these are noted in each layer as they pass, and weighed here once the forward is
over.

```
 query ─► turned back for each run ─► q·k x scale, softcap ─► softmax over all runs and sinks
          (as views are)              hidden: -inf            ─► mean over a KV head's queries
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.rotary import Rotary

_MOST_NUMBERS = 1 << 24  # float32 numbers at once
_NO_SCORE = float("-inf")


@dataclass(eq=False)
class Observer:
    """Collects, during one forward, the queries of some of its tokens.

    `tokens` [n] int64: packed numbers of the observed tokens. `layers`: of each layer their queries
    [n, Hq, d], rotated as they stand in their own rows, and the layer's rules.
    """

    tokens: Tensor
    layers: list[tuple[Tensor, AttentionRules]] = field(default_factory=list)

    def take(self, layer: int, query: Tensor, rules: AttentionRules) -> None:
        """query [N, Hq, d] of all tokens of the forward; a layer that is done again counts once."""
        del self.layers[layer:]
        self.layers.append((query[self.tokens], rules))


class SeenSlots(NamedTuple):
    """Slots `[low, high)` of the arena; a row's positions are `shift` more than theirs."""

    low: int
    high: int
    shift: int


@dataclass(frozen=True, eq=False)
class Observed:
    """Queries `which` (int64) of an observer and the keys that they see, in the order of `seen`.

    `arena` as in `KVCache`. `ahead` bool [queries, keys], or [layers, kv_heads, queries, keys]:
    not seen by that query; None: all are. `age` int64 [queries, keys]: by how much a query stands
    behind a key, by which layers with a sliding window see it; None: these see all.
    """

    observer: Observer
    which: NDArray[np.int64]
    seen: Sequence[SeenSlots]
    arena: Tensor
    rotary: Rotary
    ahead: NDArray[np.bool_] | None = None
    age: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, kv_heads, queries, keys)."""
        keys = sum(slots.high - slots.low for slots in self.seen)
        return len(self.observer.layers), self.arena.shape[2], len(self.which), keys

    def alike(self) -> Iterator[range]:
        """Layers side by side that are weighed in the same way, as many together as is cheap: for
        one query they take less time than the calls that compute them."""
        _, kv_heads, queries, keys = self.shape
        heads, head_dim = self.observer.layers[0][0].shape[1:]
        of_one = keys * (kv_heads * head_dim + heads * queries)
        at_once = max(1, _MOST_NUMBERS // max(1, of_one))
        kinds = [
            (rules.scale, rules.window, rules.softcap, rules.sinks is None, key)
            for (_, rules), key in zip(self.observer.layers, self.rotary.keys, strict=True)
        ]
        low = 0
        for _, same in groupby(kinds):
            high = low + len(list(same))
            for first in range(low, high, at_once):
                yield range(first, min(first + at_once, high))
            low = high

    def weights(self, layers: range) -> Iterator[tuple[int, Tensor]]:
        """(number of the first query, weights [layers, kv_heads, queries, keys]), a part of the
        queries at a time; `layers` are alike."""
        rules = self.observer.layers[layers[0]][1]
        heads = self.observer.layers[layers[0]][0].shape[1]
        step = max(1, _MOST_NUMBERS // max(1, len(layers) * heads * self.shape[3]))
        for low in range(0, len(self.which), step):
            chosen = torch.from_numpy(self.which[low : low + step]).to(self.arena.device)
            query = torch.stack([self.observer.layers[layer][0][chosen] for layer in layers])
            scores = self._scores(layers, query.float()) * rules.scale
            if rules.softcap:
                scores = rules.softcap * torch.tanh(scores / rules.softcap)
            hidden = self._hidden(layers, slice(low, low + step))
            if hidden is not None:
                scores = scores.masked_fill(hidden, _NO_SCORE)
            if rules.sinks is not None:
                column = self._sinks(layers).view(*scores.shape[:3], 1, 1)
                scores = torch.cat([scores, column.expand(*scores.shape[:4], 1)], -1)
            weights = torch.softmax(scores, -1)[..., : self.shape[3]].mean(2)
            yield low, weights.nan_to_num(0.0)  # of a query that sees nothing

    def _sinks(self, layers: range) -> Tensor:
        own = [self.observer.layers[layer][1].sinks for layer in layers]
        return torch.stack([sinks for sinks in own if sinks is not None]).float()

    def _scores(self, layers: range, query: Tensor) -> Tensor:
        """query [layers, queries, Hq, d] -> [layers, kv_heads, query heads of each, queries, keys];
        all turn as the first of `layers` does."""
        arena = self.arena[layers[0] : layers[-1] + 1, 0]
        count, heads = query.shape[1], query.shape[2] // arena.shape[1]
        parts = [query.new_zeros(*arena.shape[:2], 0, heads * count)]
        for shift, alike in groupby(self.seen, key=attrgetter("shift")):
            grouped = self._grouped(layers[0], query, shift)
            for slots in alike:
                parts.append(arena[:, :, slots.low : slots.high].float() @ grouped)
        return torch.cat(parts, 2).mT.reshape(*arena.shape[:2], heads, count, self.shape[3])

    def _grouped(self, layer: int, query: Tensor, shift: int) -> Tensor:
        """[layers, kv_heads, d, query heads of each * queries], as keys see them that stand `shift`
        positions before."""
        if shift:
            flat = query.flatten(0, 1)
            back = torch.full((len(flat),), -shift, device=query.device)
            query = self.rotary.turn(layer, flat, back).view(query.shape)
        by_head = query.transpose(1, 2).flatten(1, 2)
        shape = (len(query), self.arena.shape[2], -1, query.shape[-1])
        return by_head.reshape(shape).mT

    def _hidden(self, layers: range, part: slice) -> Tensor | None:
        """What a part of the queries does not see, [queries, keys] or [layers, kv_heads, 1,
        queries, keys]."""
        window = self.observer.layers[layers[0]][1].window
        hidden = None if self.ahead is None else self.ahead[..., part, :]
        if hidden is not None and hidden.ndim > 2:
            hidden = hidden[layers[0] : layers[-1] + 1][:, :, None]
        if window and self.age is not None:
            beyond = self.age[part] >= window
            hidden = beyond if hidden is None else hidden | beyond
        return None if hidden is None else torch.from_numpy(hidden).to(self.arena.device)


def attention_weights(observed: Observed) -> Tensor:
    """[layers, kv_heads, queries, keys] float32.

    For a few queries: of a whole prefill, `Sums.add` holds one layer's at a time.
    """
    weights = torch.empty(observed.shape, device=observed.arena.device)
    for layers in observed.alike():
        for low, part in observed.weights(layers):
            weights[layers[0] : layers[-1] + 1, :, low : low + part.shape[2]] = part
    return weights


def newest(weights: Tensor) -> NDArray[np.float32]:
    """[keys] of the last query, mean over layers and heads: what "attention-top" goes by."""
    mean: NDArray[np.float32] = weights[:, :, -1].mean((0, 1)).cpu().numpy()
    return mean


def window(weights: Tensor) -> NDArray[np.float32]:
    """[layers, kv_heads, keys], mean over queries: what "snapkv" goes by."""
    mean: NDArray[np.float32] = weights.mean(2).cpu().numpy()
    return mean


def mass_kept(weights: Tensor, kept: NDArray[np.bool_]) -> float:
    """Share of the last query's weight that lies on what is `kept` ([keys], or [layers, kv_heads,
    keys]), mean over layers and heads."""
    last = weights[:, :, -1].double().cpu()
    on_kept = (last * torch.from_numpy(kept)).sum(-1)
    return float((on_kept / last.sum(-1).clamp_min(1e-30)).mean())


class Sums:
    """Of each key of a conversation, what "h2o" goes by: all the weight that it got in a layer and
    KV head, and how many queries could see it. Keys are those held, in their order; new ones come
    last."""

    def __init__(self, layers: int, kv_heads: int, device: torch.device) -> None:
        self._sums = torch.zeros(layers, kv_heads, 0, device=device)
        self._queries = torch.zeros(layers, kv_heads, 0, device=device)

    def __len__(self) -> int:
        return int(self._sums.shape[2])

    def add(self, observed: Observed) -> None:
        """Of queries that were not counted before."""
        _, _, queries, keys = observed.shape
        self._grow(keys)
        for layers in observed.alike():
            for _, part in observed.weights(layers):
                self._sums[layers[0] : layers[-1] + 1] += part.sum(2)
        ahead = np.zeros((queries, keys), bool) if observed.ahead is None else observed.ahead
        could_see = queries - ahead.sum(-2)
        self._queries += torch.from_numpy(could_see).to(self._queries)

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """After an eviction: [keys], or [layers, kv_heads, keys] with as many in each."""
        self._grow(kept.shape[-1])
        mask = torch.from_numpy(np.broadcast_to(kept, tuple(self._sums.shape)).copy())
        mask = mask.to(self._sums.device)
        shape = (*self._sums.shape[:2], -1)
        self._sums = self._sums[mask].view(shape)
        self._queries = self._queries[mask].view(shape)

    def means(self, keys: int) -> NDArray[np.float32]:
        """[layers, kv_heads, keys]: weight for each query that could see the key."""
        self._grow(keys)
        mean: NDArray[np.float32] = (self._sums / self._queries.clamp_min(1)).cpu().numpy()
        return mean

    def _grow(self, keys: int) -> None:
        more = torch.zeros(*self._sums.shape[:2], keys - len(self), device=self._sums.device)
        self._sums = torch.cat([self._sums, more], -1)
        self._queries = torch.cat([self._queries, more], -1)
