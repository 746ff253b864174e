"""Whether a run has computed what its plan says, token by token."""

from __future__ import annotations

from pipeline.engine.counters import EngineCounters
from pipeline.errors import EngineError
from pipeline.job.answers import RowCounts
from pipeline.job.planning import PlannedJob


def check_tokens(planned: PlannedJob, counts: RowCounts, counters: EngineCounters) -> None:
    """A cold run without errors computes every token of the tree exactly once, of later turns what
    is new in them, and beside that only what an executor knows to have been computed on several
    devices. Raises EngineError."""
    if counters.lost_workers:
        return  # what they had computed nobody knows
    total, unique = planned.count_tokens()
    if planned.plan.conversations is not None:
        total = counts.prompt_tokens
        unique -= counts.merged_tokens
    added = planned.count_added()
    again, loaded = counters.replicated_tokens, counters.loaded_tokens
    counted = {
        "prefilled": (counters.prefilled_tokens, unique + again - loaded),
        "cached": (counts.cached_tokens, total + added - unique - again + loaded),
    }
    for name, (measured, expected) in counted.items():
        _check(name, measured, expected)


def check_prefilled(unique: int, counters: EngineCounters) -> None:
    """As `check_tokens`, of sequences that have so many unique tokens, in a job of which other
    rows were answered before. Raises EngineError."""
    if not counters.lost_workers:
        expected = unique + counters.replicated_tokens - counters.loaded_tokens
        _check("prefilled", counters.prefilled_tokens, expected)


def _check(name: str, measured: int, expected: int) -> None:
    if measured != expected:
        raise EngineError(
            f"{measured} prompt tokens were {name} where the plan says {expected}; "
            "this is a fault in coppice, please report it with the plan's summary.json"
        )
