"""Turns that workers have answered of conversations that are not over: who goes on needs them.

A conversation is with one worker. Where that one is lost, another goes on after the turns that came
home before; so no turn is answered twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import EngineHooks
from pipeline.plan.failed_turns import fail_later
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn, Timing


class TurnsOnTheWay:
    """Of one `generate` call; `hooks`: turns that an earlier session has answered."""

    def __init__(self, plan: Plan, hooks: EngineHooks) -> None:
        self._plan = plan
        self._before = hooks.earlier_turns or (lambda sequence: ())
        self._since: dict[int, list[EarlierTurn]] = {}
        self._failed: set[int] = set()

    def earlier(self, sequences: NDArray[np.int64]) -> dict[int, tuple[EarlierTurn, ...]]:
        """By place among `sequences`, what was answered of each."""
        if self._plan.conversations is None:
            return {}
        found = {
            place: (*self._before(sequence), *self._since.get(sequence, ()))
            for place, sequence in enumerate(sequences.tolist())
        }
        return {place: turns for place, turns in found.items() if turns}

    def note(self, sequence: int, completion: Completion) -> bool:
        """Whether the sequence is over with this completion; if not, its turn is kept."""
        is_last = completion.turn == self._plan.num_turns(sequence) - 1
        if completion.finish_reason == "error" and not is_last:
            self._failed.add(sequence)
        elif not is_last:
            log = () if completion.state is None else completion.state.eviction_log
            self._since.setdefault(sequence, []).append(EarlierTurn(completion.token_ids, log))
            return False
        self._since.pop(sequence, None)
        return True

    def have_failed(self, sequence: int) -> bool:
        """Whether a turn of the sequence came home as an error; `after` has told the others."""
        return sequence in self._failed

    def after(self, sequence: int, turn: int) -> list[Completion]:
        """Errors of the turns after one that has failed."""
        return fail_later(self._plan, sequence, turn)

    def given_up(self, sequence: int) -> Iterator[Completion]:
        """Errors of all turns that are left of a sequence of which too many workers have died."""
        done = len(self._before(sequence)) + len(self._since.pop(sequence, ()))
        message = (
            "every worker that computed this row died; see whether its prompt is far longer than "
            "the others, and how much memory the devices have"
        )
        yield Completion(sequence, (), "error", 0, Timing(), "WorkerLost", message, turn=done)
        yield from self.after(sequence, done)
