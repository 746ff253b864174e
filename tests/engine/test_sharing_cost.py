"""What sharing costs: measured once, kept, and free to cut anywhere without changing an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engine import sharing_cost
from pipeline.engine.base import RunControl
from pipeline.engine.device_costs import DeviceCosts
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.sharing_cost import break_even_tokens, measure
from pipeline.plan.plan import cut_by_cost
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import random_plan


@pytest.mark.parametrize("context", [256, 20, None])
def test_measured_costs_are_those_of_a_machine(context: int | None) -> None:
    loaded = tiny.load_tiny("gpt2")
    shape = replace(loaded.shape, context_length=context)
    if context:
        loaded.model.transformer.wpe.weight.data = torch.randn(context, 64)  # no more positions
    engine = PrefixEngine(replace(loaded, shape=shape), EngineSettings())
    assert 0.0 <= measure(engine.loaded, engine.backend) < float("inf")


@pytest.mark.parametrize(("own_s", "expected"), [(0.5, 20.0), (0.1, 1.0)])
def test_the_break_even_is_the_cost_of_a_span_in_keys(
    own_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more keys seem to cost nothing, sharing always pays."""
    key_s = 0.4 / (128 * 31 + 20 * 31)  # own - shared: 128 keys and a span of 20 for 31 rows
    seconds = {0: 0.1, 1: own_s, 8: own_s + 20 * key_s * 32 * 7}
    monkeypatch.setattr(sharing_cost._Bench, "seconds", lambda _, parts: seconds[parts])
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    assert measure(engine.loaded, engine.backend) == pytest.approx(expected)


def test_sharing_pays_from_the_break_even() -> None:
    plan = tiny.plan_of([[5] * 10 + [7 + i] for i in range(3)], min_prefix_tokens=16)
    below = plan.sequence_hi - plan.sequence_lo
    assert not plan.is_group.any()
    assert cut_by_cost(plan, below, 20.0).is_group.any()  # 10 tokens x (3 - 1)
    assert not cut_by_cost(plan, below, 20.1).is_group.any()


@pytest.mark.parametrize("break_even", [0.0, 20.0, 1e12])
def test_the_cut_changes_the_cost_not_the_answer(break_even: float) -> None:
    plan = random_plan(3, 16)
    every = np.arange(len(plan.sequences))
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    expected = {c.sequence: c.token_ids for c in engine.generate(plan, every, RunControl())}
    engine = PrefixEngine(engine.loaded, engine.settings, costs=DeviceCosts(break_even))
    done = {c.sequence: c.token_ids for c in engine.generate(plan, every, RunControl())}
    assert done == expected
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens


def test_calibration_runs_once_and_survives_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    measured: list[float] = []

    def count(*_: object) -> float:
        measured.append(20.0)
        return 20.0

    monkeypatch.setattr(sharing_cost, "measure", count)
    for _ in range(2):
        assert break_even_tokens(engine.loaded, engine.backend, tmp_path) == 20.0
    assert len(measured) == 1
    (kept,) = tmp_path.iterdir()
    for damage in ("{", "[]", '{"step_s": 1}'):
        kept.write_text(damage)
        assert break_even_tokens(engine.loaded, engine.backend, tmp_path) == 20.0
    assert len(measured) == 4
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    assert break_even_tokens(engine.loaded, engine.backend, nowhere / "below") == 20.0
