"""When a conversation gives up what, slowly: the turns of one conversation, their answers given.

It decides by itself when tokens go and by what weights, from what `SlowConversation` has computed;
which ones go is asked of `choose`, as in the engine. So the log of a turn can be compared with that
of the engine, event by event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.eviction import OBSERVED, Held, choose, key_of, runs_of
from pipeline.engine.health import Standing, measure
from pipeline.engine.verify.stateful_reference import Ids, SlowConversation
from pipeline.plan.conversations import Eviction
from pipeline.records import EvictionEvent


class GivenTurn(NamedTuple):
    """`fed`: ids of the prompt, of a later turn those that follow what was computed; `answer`: at
    most `max_new_tokens` ids."""

    fed: Ids
    answer: Sequence[int]
    max_new_tokens: int


class SlowTurn(NamedTuple):
    """`logits` [answer, V] that choose each token of the answer; what was given up in this turn,
    before its prompt or in its answer; `standing`: of what is kept, after each event and at the
    end."""

    logits: Tensor
    log: tuple[EvictionEvent, ...]
    standing: tuple[Standing, ...]


@dataclass(eq=False)
class SlowTurns:
    """The turns of one conversation, whose first `system` tokens are its system prompt."""

    conversation: SlowConversation
    eviction: Eviction
    system: int = 0
    _key: int = 0

    def run(self, turns: Sequence[GivenTurn]) -> Iterator[SlowTurn]:
        """One after the other."""
        conversation, starts = self.conversation, list[int]()
        for turn in turns:
            log: list[EvictionEvent] = []
            standing: list[Standing] = []
            if starts:
                self._before(turn, starts, log)
            else:
                conversation.counted_from = len(turn.fed)
                self._key = key_of(turn.fed.tolist())
            starts.append(conversation.computed)
            question_end = conversation.computed + len(turn.fed)
            logits = [conversation.feed(turn.fed)[-1:]]
            for token in turn.answer[:-1]:
                if conversation.kept.shape[-1] >= self._budget:
                    keep = int(self.eviction.evict_to * self._budget)
                    self._evict(keep, starts, (starts[-1], question_end), log)
                    standing.append(self._standing())
                logits.append(conversation.feed([token]))
            yield SlowTurn(torch.cat(logits), tuple(log), (*standing, self._standing()))

    @property
    def _budget(self) -> float:
        return float("inf") if self.eviction.evictor == "none" else self.eviction.budget_tokens

    def _before(self, turn: GivenTurn, starts: list[int], log: list[EvictionEvent]) -> None:
        """Room for a turn's prompt and answer, or at least for its prompt."""
        conversation = self.conversation
        fed, whole = len(turn.fed), len(turn.fed) + turn.max_new_tokens
        system = 0 if self.eviction.evictor == "window" else self.system
        here = (conversation.computed, conversation.computed)
        if conversation.kept.shape[-1] + whole > self._budget:
            budget = self.eviction.budget_tokens
            keep = min(int(self.eviction.evict_to * budget), budget - whole)
            self._evict(max(keep, system), starts, here, log)
            if conversation.kept.shape[-1] + fed + 1 > budget:
                self._evict(max(budget - fed - 1, system), starts, here, log)
        conversation.expect(whole)

    def _evict(
        self, keep: int, starts: list[int], question: tuple[int, int], log: list[EvictionEvent]
    ) -> None:
        conversation = self.conversation
        weights = self._weights()
        kept = conversation.kept if weights is None or weights.ndim == 1 else None
        kept = conversation.by_head(conversation.kept) if kept is None else kept
        held = Held(kept, np.array(starts), self.system, *question, weights)
        mask = choose(self.eviction, held, keep, self._key)
        if not mask.all():
            conversation.keep(kept[mask].reshape(*kept.shape[:-1], -1))
            log.append(EvictionEvent(conversation.computed, runs_of(conversation.kept)))

    def _weights(self) -> NDArray[np.float32] | None:
        conversation, evictor = self.conversation, self.eviction.evictor
        newest = np.arange(max(0, conversation.computed - OBSERVED), conversation.computed)
        if evictor == "h2o":
            return conversation.means()
        if evictor == "snapkv":
            return conversation.weights(newest).mean(2).cpu().numpy()
        if evictor == "attention-top":
            return conversation.weights(newest[-1:])[:, :, 0].mean((0, 1)).cpu().numpy()
        return None

    def _standing(self) -> Standing:
        conversation = self.conversation
        return measure(conversation.stands, conversation.query, conversation.kept)
