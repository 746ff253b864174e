"""Turns of conversations as a plan, and the time that evictions take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.evictions import Evictions
from pipeline.engine.watching import Watcher
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

Rounds = Sequence[Sequence[list[int]]]
"""[turn][conversation] token ids, without what was before; as many conversations in every turn."""

_EVICTING: tuple[tuple[type, str], ...] = (
    (Evictions, "make_room"), (Evictions, "prepare"), (Evictions, "repeat"), (Watcher, "_note"),
)  # fmt: skip


def draw_turns(
    conversations: int, turns: int, tokens: int, vocabulary_size: int
) -> list[list[list[int]]]:
    """[turn][conversation] of random ids."""
    drawn = np.random.default_rng(0).integers(
        0, vocabulary_size, (turns, conversations, tokens), np.int64
    )
    return [[ids.tolist() for ids in one] for one in drawn]


def plan_turns(rounds: Rounds, vocabulary_size: int, new_tokens: int, eviction: Eviction) -> Plan:
    """Row t x C + c is turn t of conversation c; greedy, exactly `new_tokens` an answer. The last
    round may have fewer rows: those conversations end sooner."""
    rows = [ids for one in rounds for ids in one]
    count, total = len(rounds[0]), len(rows)
    table = TokenTable.from_lists(rows, vocabulary_size)
    names, chosen = [str(row) for row in range(total)], np.zeros(total, np.int64)
    params = (SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),)
    turns = [np.arange(c, total, count) for c in range(count)]
    bounds = np.append(0, np.cumsum([len(some) for some in turns]))
    chains = Chains(bounds, np.concatenate(turns), np.zeros(count, np.int64))

    def build(some: TokenTable, kinds: NDArray[np.int64]) -> Plan:
        return build_plan(some, names, params, chosen, kind_of_row=kinds)

    return plan_conversations(build, table, names, chosen, chains, eviction)


class EvictionClock:
    """While it is entered, adds up what the engine spends on giving up tokens: choosing, moving,
    and weighing what queries looked at. `seconds` of the last time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._known: list[tuple[type, str, Callable[..., Any]]] = []

    def __enter__(self) -> EvictionClock:
        self.seconds = 0.0
        for owner, name in _EVICTING:
            method = getattr(owner, name)
            self._known.append((owner, name, method))
            setattr(owner, name, self._timed(method))
        return self

    def __exit__(self, *raised: object) -> None:
        while self._known:
            setattr(*self._known.pop())

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed
