"""The engine with a fault of the kind that scoring can have, planted on purpose (docs/audits.md).

| fault | what happens |
|---|---|
| off by one | every log-probability is read one position early, where there is one |
| sibling | each continuation but a row's first sees the one before it |
| last token | the last token of each continuation is not counted, where there are more |
| foreign prefix | the context's first half is that of another request |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np

from pipeline.engine.base import RunControl
from pipeline.engine.naive_scores import Request
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.requests import Requests
from pipeline.plan.score_planning import with_scores
from pipeline.plan.scores import ScorePlan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

ScoreFault = Literal["off by one", "sibling", "last token", "foreign prefix"]
SCORE_FAULTS: Final[tuple[ScoreFault, ...]] = (
    "off by one", "sibling", "last token", "foreign prefix",
)  # fmt: skip
Found = list[list[tuple[float, bool]]]
"""By row and request: log-probability, and whether it is greedy. NaN: it failed."""


def score_with_fault(
    engine: PrefixEngine, rows: Sequence[Sequence[Request]], fault: ScoreFault | None
) -> Found:
    """By `engine` with `fault` (None: as it is), all rows in one plan."""
    asked = [list(row) for row in rows]
    if fault == "sibling":
        asked = [[row[0], *map(_behind, row, row[1:])] for row in asked]
    if fault == "foreign prefix":
        asked = [[_mixed(request, rows[i - 1][0]) for request in row] for i, row in enumerate(rows)]
    plan = _plan(asked, engine)
    if fault == "off by one" and plan.scores is not None:
        plan = replace(plan, scores=_early(plan.scores, plan))
    scores, found = plan.scores, dict[int, tuple[float, bool]]()
    assert scores is not None
    for done in engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        low, high = scores.bounds[done.sequence : done.sequence + 2].tolist()
        numbers = scores.request[low:high].tolist()
        if done.finish_reason == "error":
            found |= dict.fromkeys(numbers, (math.nan, False))
            continue
        for number, scored in zip(numbers, done.scores, strict=True):
            kept = scored.logprobs
            if fault == "last token" and len(kept) > 1:
                kept = kept[:-1]
            found[number] = math.fsum(kept), scored.is_greedy
    numbers = iter(sorted(found))
    return [[found[next(numbers)] for _ in row] for row in rows]


def _plan(rows: Sequence[Sequence[Request]], engine: PrefixEngine) -> Plan:
    flat = [request for row in rows for request in row]
    size = engine.loaded.shape.vocabulary_size
    table = TokenTable.from_lists([[*context, *ids[:-1]] for context, ids in flat], size)
    params = (SamplingParams(max_new_tokens=1),)
    names = [str(number) for number in range(len(flat))]
    plan = build_plan(table, names, params, np.zeros(len(flat), np.int64))
    requests = Requests(
        np.append(0, np.cumsum([len(row) for row in rows])),
        np.array([len(context) for context, _ in flat], np.int64),
        np.array([ids[-1] for _, ids in flat], np.int64),
        np.zeros(len(flat), np.int64),
        np.zeros(len(rows), np.int64),
    )
    return with_scores(plan, requests)


def _behind(before: Request, request: Request) -> Request:
    return [*request[0], *before[1]], request[1]


def _mixed(request: Request, other: Request) -> Request:
    context, half = request[0], len(request[0]) // 2
    foreign = [*other[0]][:half]
    return [*foreign, *context[len(foreign) :]], request[1]


def _early(scores: ScorePlan, plan: Plan) -> ScorePlan:
    """Points one position up, where that is in the same node and no other point is there."""
    at = scores.point_position
    before = np.append(-1, at[:-1])
    is_same = np.append(-1, scores.point_node[:-1]) == scores.point_node
    may = (at > plan.tree.start[scores.point_node]) & ~(is_same & (before == at - 1))
    return replace(scores, point_position=at - may)
