"""Scores by a fleet of threads: those of one engine, each request once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pipeline.executor.fleet import Fleet
from tests.engine.test_scores import plan_of, random_requests, run
from tests.executor.test_fleet import fleet_of, tiny_engine

__all__ = ["fleet_of"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_fleet_scores_as_one_engine_does(
    fleet_of: Callable[..., Fleet],  # noqa: F811
    workers: int,
) -> None:
    plan = plan_of(random_requests(random.Random(4), 40))
    fleet, alone = fleet_of(workers), run(tiny_engine(), plan)
    found = run(fleet, plan)  # type: ignore[arg-type]
    assert found.keys() == alone.keys()
    for request, scored in alone.items():
        assert found[request].logprobs == pytest.approx(scored.logprobs, abs=1e-4)
    counters = fleet.counters
    assert counters.prefilled_tokens - counters.replicated_tokens == plan.tree.unique_tokens
