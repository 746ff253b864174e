"""One arm on a group of streams: turn by turn, the model's own answers in their histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.eviction import Held, choose
from pipeline.engine.health import Standing
from pipeline.plan.conversations import BY_HEAD, BY_WEIGHTS
from pipeline.stateful.arms import LIMIT, Arm
from pipeline.stateful.cache import Cache
from pipeline.stateful.streams import ANSWER, WINDOW, Turn

_AUTO_SHARE = 0.9  # of the window, up to which "auto" leaves gaps


class Answered(NamedTuple):
    """Of one turn, by stream: `token_ids` [B, ANSWER] of the answer; `nll` [B] of the true value,
    in nats; where kept keys stood when it was asked, the worst; `history`: tokens of it that were
    there."""

    token_ids: Tensor
    nll: Tensor
    standing: Standing
    history: int


@dataclass(frozen=True)
class Group:
    """Streams whose turns have the same lengths. `first`: number of the first of them."""

    streams: Sequence[Sequence[Turn]]
    first: int

    def prompts(self, turn: int) -> Tensor:
        """[B, tokens] of one turn."""
        return torch.tensor([stream[turn].prompt for stream in self.streams])

    def values(self, turn: int) -> Tensor:
        """[B] the right ones."""
        return torch.tensor([stream[turn].fact.value for stream in self.streams])


def stream_arm(model: Any, arm: Arm, group: Group, seed: int) -> list[Answered]:
    """Each turn's answers."""
    state = _Streaming(model, arm, group, seed)
    return [state.take_turn(turn) for turn in range(len(group.streams[0]))]


class _Streaming:
    """Streams under way. `_ids` [B, n]: all so far; the last token of an answer is in no KV yet."""

    def __init__(self, model: Any, arm: Arm, group: Group, seed: int) -> None:
        self._model, self._arm, self._group, self._seed = model, arm, group, seed
        self._ids = torch.zeros(len(group.streams), 0, dtype=torch.int64)
        self._starts: list[int] = []
        self._cache = self._empty()

    def take_turn(self, turn: int) -> Answered:
        """Give up what is too much, read the prompt, answer greedily."""
        prompts = self._group.prompts(turn)
        cache, fed = self._begin(prompts)
        before = cache.standing()
        history = cache.held + fed.shape[1] - prompts.shape[1]
        logits = self._feed_each(fed) if self._arm.each_token else cache.feed(fed, is_prefill=True)
        after = cache.standing()
        right = self._group.values(turn)
        nll = -logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
        said = [logits.argmax(-1)]
        while len(said) < ANSWER:
            said.append(cache.feed(said[-1][:, None], is_prefill=False).argmax(-1))
        answer = torch.stack(said, 1)
        self._starts.append(self._ids.shape[1])
        self._ids = torch.cat([self._ids, prompts, answer], 1)
        worst = Standing(*map(max, zip(before, after, strict=True)))  # type: ignore[arg-type]
        return Answered(answer, nll, worst, history)

    def _begin(self, prompts: Tensor) -> tuple[Cache, Tensor]:
        """What stays of the history, and what a turn feeds to it."""
        arm, cache = self._arm, self._cache
        if arm.positions == "anew":
            self._cache = self._empty()
            return self._cache, torch.cat([self._ids[:, -arm.keep :], prompts], 1)
        fed = torch.cat([self._ids[:, cache.computed :], prompts], 1)
        if arm.keep and cache.held > arm.keep and not arm.each_token:
            cache.keep(self._choose(cache.computed))
        if arm.positions == "auto":
            self._settle(fed.shape[1])
        return cache, fed

    def _feed_each(self, fed: Tensor) -> Tensor:
        question = self._cache.computed
        for column in fed.T:
            if self._cache.held >= LIMIT:
                self._cache.keep(self._choose(question))
            logits = self._cache.feed(column[:, None], is_prefill=True)
        return logits

    def _empty(self) -> Cache:
        positions = self._arm.positions
        plain = positions if positions in ("rerotate", "stale") else "gap"
        weighs = self._arm.evictor in BY_WEIGHTS
        return Cache(self._model, len(self._group.streams), plain, weighs)

    def _choose(self, question: int) -> NDArray[np.bool_]:
        """[B, n] or [B, L, H, n]: what stays of each stream; from `question` on all does."""
        arm, cache = self._arm, self._cache
        number = cache.number.numpy()
        weights = cache.seen.of(arm.evictor).numpy() if arm.evictor in BY_WEIGHTS else None
        starts = np.array([*self._starts, question])
        eviction = arm.eviction(self._seed)
        kept = []
        for row in range(cache.rows):
            held = Held(
                number[row] if arm.evictor in BY_HEAD else number[row, 0, 0],
                starts, 0, question, cache.computed,
                None if weights is None else weights[row],
            )  # fmt: skip
            kept.append(choose(eviction, held, arm.keep, self._group.first + row))
        return np.stack(kept)

    def _settle(self, coming: int) -> None:
        """Gaps while all that will be there spans little enough."""
        cache = self._cache
        first = int(cache.number.min()) if cache.held else cache.computed
        span = cache.computed + coming + ANSWER - first
        cache.positions = "gap" if span <= _AUTO_SHARE * WINDOW else "rerotate"
