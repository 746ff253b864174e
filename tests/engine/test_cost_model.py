"""The cost model: measured once, kept, and free to cut anywhere without changing an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engine import cost_model
from pipeline.engine.base import RunControl
from pipeline.engine.cost_model import CostModel, calibrated, measure
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.plan.plan import cut_by_cost
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import random_plan

EVEN = CostModel(step_s=1.0, token_s=0.1, segment_s=0.02, key_s=0.001, pair_s=0.0001)


@pytest.mark.parametrize("context", [256, 20, None])
def test_measured_costs_are_those_of_a_machine(context: int | None) -> None:
    loaded = tiny.load_tiny("gpt2")
    shape = replace(loaded.shape, context_length=context)
    if context:
        loaded.model.transformer.wpe.weight.data = torch.randn(context, 64)  # no more positions
    engine = PrefixEngine(replace(loaded, shape=shape), EngineSettings())
    model = measure(engine.loaded, engine.backend)
    costs = (model.step_s, model.token_s, model.segment_s, model.key_s, model.pair_s)
    assert min(costs) >= 0.0 < model.forward_s(32, 32, 4096, 4096) < 1.0


def test_a_forward_is_the_sum_of_its_parts_and_sharing_pays_from_the_break_even() -> None:
    assert EVEN.forward_s(2, 3, 10, 100) == pytest.approx(1.0 + 0.2 + 0.06 + 0.01 + 0.01)
    assert EVEN.break_even_tokens == pytest.approx(20.0)
    plan = tiny.plan_of([[5] * 10 + [7 + i] for i in range(3)], min_prefix_tokens=16)
    below = plan.sequence_hi - plan.sequence_lo
    assert not plan.is_group.any()
    assert cut_by_cost(plan, below, 20.0).is_group.any()  # 10 tokens x (3 - 1)
    assert not cut_by_cost(plan, below, 20.1).is_group.any()


@pytest.mark.parametrize("segment_s", [0.0, 0.02, 1e9])
def test_the_cut_changes_the_cost_not_the_answer(segment_s: float) -> None:
    plan = random_plan(3, 16)
    every = np.arange(len(plan.sequences))
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    expected = {c.sequence: c.token_ids for c in engine.generate(plan, every, RunControl())}
    costs = replace(EVEN, segment_s=segment_s)
    engine = PrefixEngine(engine.loaded, engine.settings, cost_model=costs)
    done = {c.sequence: c.token_ids for c in engine.generate(plan, every, RunControl())}
    assert done == expected
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens


def test_calibration_runs_once_and_survives_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    measured: list[CostModel] = []

    def count(*_: object) -> CostModel:
        measured.append(EVEN)
        return EVEN

    monkeypatch.setattr(cost_model, "measure", count)
    for _ in range(2):
        assert calibrated(engine.loaded, engine.backend, tmp_path) == EVEN
    assert len(measured) == 1
    (kept,) = tmp_path.iterdir()
    for damage in ("{", "[]", '{"step_s": 1}'):
        kept.write_text(damage)
        assert calibrated(engine.loaded, engine.backend, tmp_path) == EVEN
    assert len(measured) == 4
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    assert calibrated(engine.loaded, engine.backend, nowhere / "below") == EVEN
