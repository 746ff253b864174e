"""Turns of conversations that are answered already, by an earlier session or by this one."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.base import EarlierTurns
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn


class Answered:
    """So that a conversation can go on where it was."""

    def __init__(self, earlier: EarlierTurns | None) -> None:
        self._earlier = earlier
        self._since: dict[int, list[EarlierTurn]] = {}

    def turns(self, sequence: int) -> Sequence[EarlierTurn]:
        """See `EngineHooks.earlier_turns`."""
        before = () if self._earlier is None else self._earlier(sequence)
        return [*before, *self._since.get(sequence, ())]

    def note(self, plan: Plan, completion: Completion) -> bool:
        """Whether that was the last that will come of its sequence."""
        if plan.conversations is None:
            return True
        sequence, state = completion.sequence, completion.state
        if state is not None:
            turn = EarlierTurn(completion.token_ids, state.eviction_log)
            self._since.setdefault(sequence, []).append(turn)
        is_last = completion.turn + 1 == len(plan.conversations.turns(sequence))
        if is_last:
            self._since.pop(sequence, None)
        return is_last
