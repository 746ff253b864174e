"""Grammars over token ids alone, for tests of engines: finite automata, drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import TokenIds
from tests.engine.tiny import EOS, VOCABULARY


class Thinks(NamedTuple):
    begin_ids: tuple[int, ...] = (5,)
    end_ids: tuple[int, ...] = (6, 7)
    blank_ids: frozenset[int] = frozenset({8})

    def is_open(self, prompt: TokenIds) -> bool:
        said = [token for token in prompt if token not in self.blank_ids]
        return tuple(said[-len(self.begin_ids) :]) == self.begin_ids


class Automaton:
    """A constraint is `{"next": [{token: state}, ...], "ends": [state, ...]}` as JSON."""

    def __init__(self, constraint: str) -> None:
        said = json.loads(constraint)
        self._next = [{int(t): s for t, s in steps.items()} for steps in said["next"]]
        self._ends = set(said["ends"])
        self._state = 0

    @property
    def steps(self) -> dict[int, int]:
        return self._next[self._state]

    @property
    def may_end(self) -> bool:
        return self._state in self._ends

    @property
    def is_over(self) -> bool:
        return self.may_end and not self.steps

    def allows(self, token_id: int) -> bool:
        return token_id in self.steps

    def accept(self, token_id: int) -> str | None:
        if token_id not in self.steps:
            return "a token does not fit"
        self._state = self.steps[token_id]
        return None

    def forced(self) -> list[int]:
        state, said = self._state, list[int]()
        while len(self._next[state]) == 1 and state not in self._ends and len(said) < 100:
            ((token_id, state),) = self._next[state].items()
            said.append(token_id)
        return said

    def next_forced(self) -> int | None:
        return next(iter(self.forced()), None)


class Automata:
    """As `Grammars` has it. Counts how often masks were made."""

    vocabulary_size = VOCABULARY

    def __init__(self, tags: Thinks | None = None) -> None:
        self.tags = tags
        self.num_fills = 0

    def matcher(self, constraint: str) -> Automaton:
        return Automaton(constraint)

    def fill(self, matchers: Sequence[Automaton]) -> NDArray[np.int32]:
        self.num_fills += 1
        bits = np.zeros((len(matchers), -(-VOCABULARY // 32) * 32), bool)
        for row, matcher in zip(bits, matchers, strict=True):
            row[list(matcher.steps)] = True
            row[EOS] = matcher.may_end
        return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def draw_constraint(draw: random.Random) -> str:
    """Layers of states: runs that are forced, choices, ends in the middle, loops."""
    steps: list[dict[int, int]] = []
    ends = []
    for _ in range(draw.randrange(1, 4)):
        for _ in range(draw.choice([0, 1, 2, 5, 40])):
            steps.append({draw.randrange(4, VOCABULARY): len(steps) + 1})
        here = len(steps)
        if draw.random() < 0.3:
            ends.append(here)
        tokens = draw.sample(range(4, VOCABULARY), draw.choice([2, 3, 30]))
        steps.append({token: here if draw.random() < 0.4 else here + 1 for token in tokens})
        steps[-1][tokens[0]] = here + 1
    ends.append(len(steps))
    steps.append({})
    return json.dumps({"next": steps, "ends": ends})


def anything() -> str:
    """Whatever a model says."""
    tokens = (token for token in range(VOCABULARY) if token != EOS)
    return json.dumps({"next": [dict.fromkeys(tokens, 0)], "ends": [0]})


def accepts(constraint: str, token_ids: Sequence[int]) -> bool:
    """Whether these are a whole answer, an end of text behind it or not."""
    automaton = Automaton(constraint)
    said = token_ids[:-1] if token_ids and token_ids[-1] == EOS else token_ids
    return all(automaton.accept(t) is None for t in said) and automaton.may_end
