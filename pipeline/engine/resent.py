"""Conversations for engines that carry no KV: the history is sent again with every turn.

```
 turn 0   | first prompt |                                  ─► answer 0
 turn 1   | first prompt | answer 0 | what it adds |        ─► answer 1
 turn 2   | first prompt | answer 0 | ... | answer 1 | ...  ─► answer 2
```

A sequence of any other plan is a conversation of one turn. Knows no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.engine.base import EngineHooks, Indices, RunControl
from pipeline.engine.health import is_degenerate
from pipeline.plan.conversations import CONTEXT_EXCEEDED, Eviction, join_ids
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn, SamplingParams, Timing, TurnState

RESENT_NOTE = "conversations are sent again in full with every turn; no KV is carried"


@dataclass(frozen=True)
class Turn:
    """What is to be answered. `prompt`: all ids so far, of which `history_tokens` are those of
    earlier turns and their answers."""

    sequence: int
    number: int
    prompt: list[int]
    history_tokens: int
    params: SamplingParams
    noise_key: int


class ResentSequence:
    """The turns of one sequence, one after the other.

    Whoever runs it takes `next_turn` and gives its completion to `complete` until there is none,
    then `refused`.
    """

    def __init__(self, plan: Plan, sequence: int, hooks: EngineHooks) -> None:
        self._plan = plan
        self._sequence = sequence
        turns = plan.conversations
        self._eviction = Eviction() if turns is None else turns.eviction
        self._turn: Turn | None = None
        self._number = 0
        self._ids: list[int] = []
        self._answer: tuple[int, ...] = ()
        self._has_failed = False
        earlier = () if hooks.earlier_turns is None else hooks.earlier_turns(sequence)
        for done in earlier:
            self._say(done)

    def next_turn(self) -> Turn | None:
        """The turn that comes next; None where there is none, or none can run."""
        self._turn = None
        if self._has_failed or self._number == self._plan.num_turns(self._sequence):
            return None
        prompt = self._prompt()
        params = self._eviction.fit(self._params(), len(prompt))
        if params is None:
            return None
        key = self._plan.noise_key_of(self._sequence, self._number)
        self._turn = Turn(self._sequence, self._number, prompt, len(self._ids), params, key)
        return self._turn

    @property
    def params(self) -> SamplingParams:
        """Of the turn that was taken last."""
        assert self._turn is not None
        return self._turn.params

    def complete(self, completion: Completion) -> Completion:
        """What became of the turn that was taken last, as an engine yields it."""
        turn = self._turn
        assert turn is not None
        if self._plan.conversations is None:
            self._number += 1
            return completion
        completion = replace(completion, turn=turn.number, prompt_tokens=len(turn.prompt))
        if completion.finish_reason == "error":
            self._number += 1
            self._has_failed = True
            return completion
        completion = replace(completion, state=self._state(turn, completion.token_ids))
        self._say(EarlierTurn(completion.token_ids))
        return completion

    def refused(self) -> Iterator[Completion]:
        """Errors of the turns that are left: one failed before them, or the window is full."""
        for number in range(self._number, self._plan.num_turns(self._sequence)):
            if self._has_failed:
                yield Completion.after_failed(self._sequence, number)
            else:
                self._has_failed = True
                said = self._eviction.why_full(self._params(), str(len(self._prompt())))
                yield Completion(
                    self._sequence, (), "error", 0, Timing(), CONTEXT_EXCEEDED, said, turn=number
                )

    def _params(self) -> SamplingParams:
        return self._plan.params_of(self._sequence, self._number)

    def _prompt(self) -> list[int]:
        ids = self._plan.table[self._plan.row_of(self._sequence, self._number)]
        fed = join_ids(self._ids[-1], ids) if self._number else ids.astype(np.int64)
        prompt: list[int] = self._ids[:-1] + fed.tolist()
        return prompt

    def _say(self, answered: EarlierTurn) -> None:
        self._ids = [*self._prompt(), *answered.token_ids]
        self._answer = answered.token_ids
        self._number += 1

    def _state(self, turn: Turn, token_ids: tuple[int, ...]) -> TurnState:
        """As if the KV of all tokens but the last, which no forward has seen, were there."""
        tokens = len(turn.prompt) + len(token_ids) - 1
        return TurnState(
            history_tokens=turn.history_tokens,
            kept_tokens=tokens,
            evicted_tokens=0,
            evictions=0,
            span=tokens,
            ctx_frac=tokens / self._eviction.window if self._eviction.window else 0.0,
            skew=0,
            duplicate_positions=0,
            runs=1,
            gap_ratio=0.0,
            sink_kept=True,
            mass_kept=1.0,
            key_turns=0,
            prefill_peak=len(turn.prompt),
            degenerate=is_degenerate(token_ids, self._answer),
        )


def answer_in_order(
    plan: Plan,
    sequences: Indices,
    control: RunControl,
    hooks: EngineHooks,
    answer: Callable[[Turn], Completion],
) -> Iterator[Completion]:
    """One sequence after the other, turn by turn, for an engine that does nothing else meanwhile.
    A drain ends it after the turn that it is at; a later session goes on from there."""
    for sequence in _one_at_a_time(sequences, control):
        resent = ResentSequence(plan, sequence, hooks)
        while (turn := resent.next_turn()) is not None:
            yield resent.complete(answer(turn))
            if control.should_drain() or control.should_abort():
                return
        yield from resent.refused()


def _one_at_a_time(sequences: Indices, control: RunControl) -> Iterator[int]:
    """The next sequence of an engine that runs one after the other, as `control` steers it."""
    waiting = deque(sequences.tolist())
    while waiting and not (control.should_drain() or control.should_abort()):
        yield waiting.popleft()
        if control.wants_back():
            for _ in range(control.take_back(waiting)):
                waiting.pop()
