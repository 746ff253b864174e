"""What rows ask of their next token and how they end, as columns: no row is looked at for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.live import LiveRow
from pipeline.engine.sampler import has_rules
from pipeline.engine.sampling import Sampled
from pipeline.plan.plan import Plan
from pipeline.records import SamplingParams
from pipeline.request_rules import read_asked

_NO_TOKEN = -1
_NAMED: Final = 4  # tokens that a row may name as ends before it is looked at itself

Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Kinds(NamedTuple):
    """Of some rows, [rows] each. `is_plain`: its next token is the likeliest one; `is_touched`:
    whether it ends it says itself, by a text or a grammar; `ends` [rows, m]: tokens that end it, -1
    for none; `most`: tokens that it may have."""

    is_plain: Flags
    is_touched: Flags
    ends: Ints
    most: Ints

    def ends_by(self, chosen: Sampled) -> Flags:
        """Rows that end by these tokens, or that have none to go on with."""
        by_token = (chosen.token_ids[:, None] == self.ends).any(1)
        ended: Flags = by_token | ~chosen.is_finite
        return ended


class RowKinds:
    """Of the rows of one plan; each set of parameters is looked at when it is first met."""

    def __init__(self, plan: Plan, eos: frozenset[int]) -> None:
        count = len(plan.params)
        self._params: Final = plan.params
        self._number: Final = plan.sequences.params
        self._eos: Final = sorted(eos)
        # A conversation's turns have parameters of their own: its rows are looked at one by one.
        self._is_simple: Final = plan.conversations is None
        self._is_known: Final = np.zeros(count, bool)
        self._is_plain: Final = np.zeros(count, bool)
        self._is_touched: Final = np.zeros(count, bool)
        self._ends: Final = np.full((count, len(eos) + _NAMED), _NO_TOKEN, np.int64)
        self._most: Final = np.zeros(count, np.int64)

    def of(self, rows: Sequence[LiveRow]) -> Kinds:
        if not self._is_simple:
            most = np.array([row.params.max_new_tokens for row in rows], np.int64)
            none = np.full((len(rows), 1), _NO_TOKEN, np.int64)
            return Kinds(np.zeros(len(rows), bool), np.ones(len(rows), bool), none, most)
        number = self._number[[row.sequence for row in rows]]
        for new in np.unique(number[~self._is_known[number]]):
            self._look_at(int(new), self._params[int(new)])
        return Kinds(
            self._is_plain[number], self._is_touched[number], self._ends[number], self._most[number]
        )

    def _look_at(self, number: int, params: SamplingParams) -> None:
        ends = [] if params.ignore_eos else list(self._eos)
        named = read_asked(params.asked).stop_token_ids if params.asked else ()
        if len(named) <= _NAMED:
            ends += named
        self._ends[number, : len(ends)] = ends
        self._most[number] = params.max_new_tokens
        is_guided = params.is_guided
        self._is_touched[number] = bool(params.stop) or len(named) > _NAMED or is_guided
        is_chosen = not params.is_greedy or has_rules(params)
        self._is_plain[number] = not (is_chosen or is_guided or params.logprobs is not None)
        self._is_known[number] = True
