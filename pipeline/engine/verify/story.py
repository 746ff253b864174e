"""What became of one conversation up to some turn: its ids, and what it gave up on the way.

It is all that a slow way needs to compute the same turn again, and that an engine needs to go on
after it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.eviction import mask_of
from pipeline.plan.conversations import join_ids
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn, EvictionEvent


class ToldTurn(NamedTuple):
    """`added` ids of its prompt (see `ConversationPlan`), `answer` of at most `max_new_tokens` ids,
    and the evictions before and in it."""

    added: Sequence[int]
    answer: Sequence[int]
    max_new_tokens: int
    log: Sequence[EvictionEvent]


@dataclass(frozen=True)
class Story:
    """At least one turn of a conversation, whose first `system_tokens` are its system prompt."""

    turns: tuple[ToldTurn, ...]
    system_tokens: int = 0

    @classmethod
    def of(cls, plan: Plan, done: Sequence[Completion]) -> Story:
        """Of the turns of one sequence that an engine has answered, in order."""
        assert plan.conversations is not None and done
        sequence = done[0].sequence
        turns = []
        for turn, completion in zip(plan.conversations.turns(sequence), done, strict=False):
            added = plan.table[int(plan.conversations.row[turn])].astype(np.int64).tolist()
            params = plan.params[int(plan.conversations.params[turn])]
            log = () if completion.state is None else completion.state.eviction_log
            turns.append(ToldTurn(added, completion.token_ids, params.max_new_tokens, log))
        return cls(tuple(turns), int(plan.conversations.system_tokens[sequence]))

    def answering(self, answer: Sequence[int]) -> Story:
        """With another last answer, or its beginning."""
        last = self.turns[-1]._replace(answer=tuple(answer))
        return replace(self, turns=(*self.turns[:-1], last))

    @cached_property
    def fed(self) -> list[NDArray[np.int64]]:
        """By turn, the ids of its prompt that are computed: with the last one of the answer
        before."""
        first, *later = self.turns
        fed = [np.array(first.added, np.int64)]
        for before, turn in zip(self.turns, later, strict=False):
            fed.append(join_ids(before.answer[-1], np.array(turn.added, np.int64)))
        return fed

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """All that are computed: the last one of the last answer is not."""
        parts = zip(self.fed, self.turns, strict=True)
        return np.concatenate([x for fed, turn in parts for x in (fed, turn.answer[:-1])]).astype(
            np.int64
        )

    @cached_property
    def starts(self) -> list[int]:
        """By turn, the number of its first token."""
        lengths = [
            len(fed) + len(turn.answer) - 1 for fed, turn in zip(self.fed, self.turns, strict=True)
        ]
        return [0, *np.cumsum(lengths[:-1]).tolist()]

    @property
    def chosen_at(self) -> NDArray[np.int64]:
        """Numbers of the tokens whose logits choose each token of the last answer."""
        first = self.starts[-1] + len(self.fed[-1]) - 1
        return np.arange(first, first + len(self.turns[-1].answer))

    @property
    def log(self) -> list[EvictionEvent]:
        return [event for turn in self.turns for event in turn.log]

    @property
    def expected(self) -> list[tuple[int, int]]:
        """Of each turn after the first the number of its first token, and how many tokens were
        expected there: those of its prompt and as many as its answer may have."""
        told = zip(self.starts, self.fed, self.turns, strict=True)
        return [(start, len(fed) + turn.max_new_tokens) for start, fed, turn in told][1:]

    @property
    def turns_since_gone(self) -> int | None:
        """How many turns before the last one the newest token was that no head has kept; None:
        every token is kept by some."""
        kept = np.ones(len(self.ids), bool)
        for event in self.log:
            numbers = np.arange(min(event.at, len(kept)))
            every = [mask_of(event._replace(kept=(runs,)), numbers) for runs in event.kept]
            kept[numbers] &= np.any(every, axis=0)
        gone = np.flatnonzero(~kept)
        if not len(gone):
            return None
        return len(self.turns) - bisect.bisect_right(self.starts, int(gone[-1]))

    @property
    def earlier(self) -> list[EarlierTurn]:
        """The turns before the last one, as an engine takes them."""
        return [EarlierTurn(tuple(turn.answer), tuple(turn.log)) for turn in self.turns[:-1]]
