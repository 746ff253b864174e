"""Rates of one run become the estimate of the next plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.model.identity import identify_model
from pipeline.model.rates import Rates, recall_rates, remember_rates
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.conversation_job import AS_TURNS, write_turns
from tests.tiny_job import write_prompts

RUN = {"prefilled_tokens": 4000, "generated_tokens": 1000, "prefill_s": 2.0, "decode_s": 5.0}


@pytest.fixture(autouse=True)
def own_cache(kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_remembered_is_recalled_for_the_same_model_only(model_folder: Path) -> None:
    settings = JobSettings.from_flat({"model": str(model_folder)}).model
    assert recall_rates(settings, identify_model(settings)) is None
    remember_rates(settings, identify_model(settings), RUN)
    rates = recall_rates(settings, identify_model(settings))
    assert rates is not None
    assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s) == (2000.0, 200.0)
    assert (
        recall_rates(settings.model_copy(update={"dtype": "bfloat16"}), identify_model(settings))
        is None
    )
    estimate = rates.estimate(1000, 100)
    assert (estimate["prefill_s"], estimate["decode_s"]) == (0.5, 0.5)


def test_a_short_run_and_a_damaged_cache_say_nothing(model_folder: Path, tmp_path: Path) -> None:
    settings = JobSettings.from_flat({"model": str(model_folder)}).model
    remember_rates(settings, identify_model(settings), RUN | {"generated_tokens": 999})
    assert recall_rates(settings, identify_model(settings)) is None
    remember_rates(settings, identify_model(settings), RUN)
    (place,) = (tmp_path / "cache").rglob("*.json")
    place.write_text('{"prefill_tokens_per_s": 1}')
    assert recall_rates(settings, identify_model(settings)) is None


def test_a_plan_estimates_from_the_last_run(tmp_path: Path, model_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", [f"{i * i} and more words" for i in range(99)])
    flat = {"model": str(model_folder), "max_new_tokens": 12, "ignore_eos": True}
    settings = JobSettings.from_flat(flat)
    assert plan_job(str(source), settings).summary.estimate is None
    counters = run_job(str(source), tmp_path / "out", settings).counters
    estimate = plan_job(str(source), settings).summary.estimate
    assert estimate is not None
    assert estimate["prefill_s"] == pytest.approx(counters["prefill_s"])
    assert estimate["decode_s"] == pytest.approx(counters["decode_s"])
    assert isinstance(recall_rates(settings.model, identify_model(settings.model)), Rates)


def test_a_plan_of_conversations_says_what_becomes_of_those_that_give_way(
    tmp_path: Path, model_folder: Path
) -> None:
    """As the last job with conversations measured it, whatever ran since."""
    source = write_turns(tmp_path / "turns.parquet")
    settings = JobSettings.from_flat({"model": str(model_folder), **AS_TURNS})

    def giving_way() -> object:
        conversations = plan_job(str(source), settings).summary.conversations
        assert conversations is not None
        return conversations["giving_way"]

    assert giving_way() is None
    identity = identify_model(settings.model)
    remember_rates(settings.model, identity, RUN, saves_from=1234)
    remember_rates(settings.model, identity, RUN)
    assert "from 1,234 tokens on" in str(giving_way())
