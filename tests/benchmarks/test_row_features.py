"""The benchmark of what rows may ask for, on a tiny model: what it counts and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import row_features, scratch
from benchmarks.prompts import shared_prompts
from benchmarks.setup import Setup
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.records import SamplingParams
from pipeline.settings import JobSettings


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("bench")))
        none = Path("/nowhere")
        yield Setup("tiny", "float32", 4, 2, 60.0, none, none)


@pytest.fixture(scope="module")
def engine(setup: Setup) -> Engine:
    flat = {"model": setup.model(), "dtype": "float32", "device": "cpu", "busy_device": "share"}
    return make_engine(JobSettings.from_flat(flat))


def test_samples_are_counted_and_stand_beside_vllm_s(setup: Setup, engine: Engine) -> None:
    prompts = shared_prompts(3, 40, 4, setup.vocabulary_size)
    found = row_features.measure_samples(engine, setup, prompts, 16)
    assert found["unique_tokens"] == found["computed"] == 40 + 3 * 4
    assert found["generated"] == 3 * 16 * 4 and found["prompt_tokens"] == 132
    found["vllm"] = {"engine": "vllm 0", "seconds": 2 * found["seconds"], "computed": 60,
                     "generated": 192}  # fmt: skip
    shown = row_features.table({"samples": found, "wishes": {"x": {"ratio": 1.25}}})
    assert "vLLM : coppice 2.00" in shown and "| x | 1.250 |" in shown


def test_every_wish_has_its_price_and_free_rows_are_looked_at(
    setup: Setup, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = shared_prompts(4, 16, 4, setup.vocabulary_size)
    found = row_features.measure_wishes(engine, setup, prompts)
    assert found.keys() == row_features.WISHES.keys()
    assert all(of["ratio"] > 0 and of["pairs"] == 2 for of in found.values())
    plain = SamplingParams(setup.new_tokens, ignore_eos=True)
    _, right = row_features.run(engine, row_features.plan_of(prompts, setup, plain))
    wrong = {sequence: replace(done, token_ids=()) for sequence, done in right.items()}
    with pytest.raises(AssertionError, match="a free row has changed"):
        row_features.check_free_rows(engine, prompts, setup, plain, wrong)
