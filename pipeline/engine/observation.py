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
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.rotary import Rotary

_MOST_SCORES = 1 << 24  # float32 numbers at once
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

    def weights(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first query, weights [kv_heads, queries, keys]), a part of the queries at
        a time."""
        query, rules = self.observer.layers[layer]
        step = max(1, _MOST_SCORES // max(1, query.shape[1] * self.shape[3]))
        keys = self.arena[layer, 0][:, self._slots].float()
        for low in range(0, len(self.which), step):
            chosen = torch.from_numpy(self.which[low : low + step]).to(query.device)
            scores = self._scores(layer, query[chosen], keys)
            if rules.softcap:
                scores = rules.softcap * torch.tanh(scores / rules.softcap)
            hidden = self._hidden(layer, slice(low, low + step))
            if hidden is not None:
                scores = scores.masked_fill(hidden, _NO_SCORE)
            if rules.sinks is not None:
                sinks = rules.sinks.float().view(len(keys), -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sinks], -1)
            weights = torch.softmax(scores, -1)[..., : keys.shape[1]].mean(1)
            yield low, weights.nan_to_num(0.0)  # of a query that sees nothing

    def _scores(self, layer: int, query: Tensor, keys: Tensor) -> Tensor:
        """[kv_heads, query heads of each, queries, keys]."""
        query = query.float()
        parts, low = [], 0
        for shift, count in self._shifts:
            heads = query
            if shift:
                back = torch.full((len(query),), -shift, device=query.device)
                heads = self.rotary.turn(layer, query, back)
            grouped = heads.transpose(0, 1).reshape(len(keys), -1, *heads.shape[::2])
            parts.append(grouped @ keys[:, None, low : low + count].mT)
            low += count
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return scores * self.observer.layers[layer][1].scale

    @cached_property
    def _slots(self) -> Tensor:
        slots = [np.zeros(0, np.int64), *(np.arange(s.low, s.high) for s in self.seen)]
        return torch.from_numpy(np.concatenate(slots)).to(self.arena.device)

    @cached_property
    def _shifts(self) -> list[tuple[int, int]]:
        """(shift, keys) of neighbours that are seen alike."""
        return [
            (shift, sum(slots.high - slots.low for slots in alike))
            for shift, alike in groupby(self.seen, key=attrgetter("shift"))
        ]

    def _hidden(self, layer: int, part: slice) -> Tensor | None:
        """What a part of the queries does not see, [queries, keys] or [kv_heads, 1, queries,
        keys]."""
        window = self.observer.layers[layer][1].window
        hidden = None if self.ahead is None else self.ahead[..., part, :]
        if hidden is not None and hidden.ndim > 2:
            hidden = hidden[layer][:, None]
        if window and self.age is not None:
            beyond = self.age[part] >= window
            hidden = beyond if hidden is None else hidden | beyond
        return None if hidden is None else torch.from_numpy(hidden).to(self.arena.device)


def attention_weights(observed: Observed) -> Tensor:
    """[layers, kv_heads, queries, keys] float32.

    For a few queries: of a whole prefill, `Sums.add` holds one layer's at a time.
    """
    weights = torch.empty(observed.shape, device=observed.arena.device)
    for layer in range(len(weights)):
        for low, part in observed.weights(layer):
            weights[layer, :, low : low + part.shape[1]] = part
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
        layers, _, queries, keys = observed.shape
        self._grow(keys)
        for layer in range(layers):
            for _, part in observed.weights(layer):
                self._sums[layer] += part.sum(1)
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
