"""Which tokens of a conversation stay when not all can. Knows token numbers, no slots, no tensors.

```
 number   0 .. system .. [turn][turn][turn] .. question .. question_end .. newest
 stays    system prompt                        current turn's own prompt
 may go               earlier turns                        its answer so far
```

Every evictor but "oldest" ranks what may go: by a tier, and within a tier by a score. See
docs/stateful.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline.plan.conversations import Eviction
from pipeline.records import EvictionEvent

OBSERVED: Final = 32
"""Queries, the last of a turn's prefill, whose attention "snapkv" goes by."""
_POOLED = 5  # neighbours that share their weights in "snapkv"
_NEVER, _RANKED, _PREFERRED, _PROTECTED = range(4)


@dataclass(frozen=True, eq=False)
class Held:
    """Tokens that a conversation has on the device, oldest first.

    `index` int64: their numbers in the conversation, from 0; [n], or [layers, kv_heads, n] where
    each head keeps its own. `turn_starts` int64 [turns]: number of the first token of each turn (of
    its own prompt). `system`: the first `system` tokens of the conversation are its system prompt.
    `question`: tokens from this number on belong to the current turn's own prompt and answer;
    `question_end`: those from here on are its answer. `weights` float32, as `index`: how much
    attention they got (None where the evictor asks for none).
    """

    index: NDArray[np.int64]
    turn_starts: NDArray[np.int64]
    system: int
    question: int
    question_end: int
    weights: NDArray[np.float32] | None = None

    @property
    def newest(self) -> int:
        """Number of the newest token."""
        return int(self.index[..., -1].max())

    def is_protected(self, evictor: str) -> NDArray[np.bool_]:
        """As `index`: what no eviction takes, the turn's own prompt and the system prompt."""
        index = self.index
        asked = (index >= self.question) & (index < self.question_end)
        return asked if evictor == "window" else asked | (index < self.system)


def choose(eviction: Eviction, held: Held, keep: int, key: int) -> NDArray[np.bool_]:
    """Which tokens stay, as `held.index`: `keep` of each head, or all that are protected if those
    are more.

    Fewer than `keep` where whole quarters ("oldest") or turns go, or all but the first tokens and
    the current turn ("gist"). `key`, with the eviction's seed, decides in "random".
    """
    count = held.index.shape[-1]
    if count <= keep:
        return np.ones(held.index.shape, bool)
    if eviction.unit == "turn":
        return _without_old_turns(eviction, held, keep)
    if eviction.evictor == "oldest":
        return _without_quarters(held, keep)
    tier, score = _ranking(eviction, held, keep, key)
    return _best(tier, score, keep)


def key_of(first_prompt: Sequence[int]) -> int:
    """What tells a conversation from others in "random", wherever and beside whom it runs."""
    return zlib.crc32(np.array(first_prompt, np.int64).tobytes())


def runs_of(index: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Of token numbers [n] or [layers, kv_heads, n], rising: what `EvictionEvent.kept` holds."""
    return tuple(_runs(row) for row in _heads(index))


def mask_of(event: EvictionEvent, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the held tokens `index` an eviction kept; [n], or [layers, kv_heads, n]."""
    rows = _heads(index)
    kept = event.kept * len(rows) if len(event.kept) == 1 else event.kept
    inside = [
        np.searchsorted(np.array(runs, np.int64), row, side="right") % 2 == 1
        for runs, row in zip(kept, rows, strict=True)
    ]
    return np.stack(inside).reshape(index.shape)


def _heads(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """[heads, n], one of all where none keeps its own."""
    return index.reshape(math.prod(index.shape[:-1]), index.shape[-1])


def _runs(index: NDArray[np.int64]) -> tuple[int, ...]:
    if not len(index):
        return ()
    breaks = np.flatnonzero(np.diff(index) != 1)
    low = index[np.append(0, breaks + 1)]
    high = index[np.append(breaks, len(index) - 1)] + 1
    return tuple(np.stack([low, high], 1).ravel().tolist())


def _first_kept(eviction: Eviction) -> int:
    """As many of a conversation's first tokens are kept besides its system prompt."""
    if eviction.evictor in ("gist", "gist-recent"):
        return eviction.gist_tokens
    return eviction.sink_tokens if eviction.evictor == "sink-recent" else 0


def _ranking(
    eviction: Eviction, held: Held, keep: int, key: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(tier, score) of each token, as `held.index`; the higher the later it goes."""
    index = held.index
    tier, score = _by_age(held, _first_kept(eviction))
    match eviction.evictor:
        case "gist":
            tier[(tier == _RANKED) & (index < held.question)] = _NEVER
        case "random":
            seed = [eviction.seed % 2**64, key % 2**64, held.newest]
            score = np.random.default_rng(seed).random(index.shape)
        case "attention-top":
            score = _weights(held)
        case "h2o":
            recent = index >= index[..., -(keep // 2) :][..., :1] if keep > 1 else index < 0
            tier[recent] = _PREFERRED
            score = np.where(recent, score, _weights(held))
        case "snapkv":
            observed = _observed(held)
            tier[observed] = _PREFERRED
            score = np.where(observed, score, _pooled(np.where(observed, 0.0, _weights(held))))
    tier[held.is_protected(eviction.evictor)] = _PROTECTED
    return tier, score


def _by_age(held: Held, first: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """See `_ranking`: the `first` tokens of the conversation, then the newest."""
    is_first = held.index < first
    score = np.where(is_first, -held.index, held.index).astype(np.float64)
    return np.where(is_first, _PREFERRED, _RANKED), score


def _best(tier: NDArray[np.int64], score: NDArray[np.float64], keep: int) -> NDArray[np.bool_]:
    """The first `keep` of each row by tier and score, and all that are protected; of equal ones
    the newer."""
    place = np.broadcast_to(np.arange(tier.shape[-1]), tier.shape)
    best = np.lexsort((place, score, tier), axis=-1)[..., -keep:] if keep else place[..., :0]
    chosen = np.zeros(tier.shape, bool)
    np.put_along_axis(chosen, best, True, -1)
    stays: NDArray[np.bool_] = (chosen & (tier != _NEVER)) | (tier == _PROTECTED)
    return stays


def _without_quarters(held: Held, keep: int) -> NDArray[np.bool_]:
    """Of what may go the oldest quarter, of the rest again, until enough has gone."""
    stays = np.ones(held.index.shape, bool)
    may_go = np.flatnonzero(~held.is_protected("oldest"))
    while stays.sum() > keep and len(may_go):
        gone = -(-len(may_go) // 4)
        stays[may_go[:gone]] = False
        may_go = may_go[gone:]
    return stays


def _without_old_turns(eviction: Eviction, held: Held, keep: int) -> NDArray[np.bool_]:
    """Without the oldest turns, whole, until enough has gone; then without the oldest tokens of
    the current turn's answer."""
    index = held.index
    tier, score = _by_age(held, _first_kept(eviction))
    tier[held.is_protected(eviction.evictor)] = _PROTECTED
    may_go = (tier == _RANKED) & (index < held.question)
    turn = np.searchsorted(held.turn_starts, index, side="right")
    for earlier in np.unique(turn[may_go]).tolist():
        if (tier != _NEVER).sum(-1).max() <= keep:
            break
        tier[may_go & (turn == earlier)] = _NEVER
    return _best(tier, score, keep)


def _weights(held: Held) -> NDArray[np.float64]:
    assert held.weights is not None, "this evictor goes by weights"
    return held.weights.astype(np.float64)


def _observed(held: Held) -> NDArray[np.bool_]:
    """The last tokens of the turn's prefill, and all after them."""
    prefilled = (held.index < held.question_end).sum(-1, keepdims=True)
    observed: NDArray[np.bool_] = np.arange(held.index.shape[-1]) >= prefilled - OBSERVED
    return observed


def _pooled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each weight and its neighbours, beyond the edges 0."""
    side = _POOLED // 2
    padding = [(0, 0)] * (weights.ndim - 1) + [(side, side)]
    pooled: NDArray[np.float64] = sliding_window_view(np.pad(weights, padding), _POOLED, -1).mean(
        -1
    )
    return pooled
