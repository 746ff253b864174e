"""`--price-per-hour`: money in plan, summary, report, metrics and nights, and none without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.plan_table import plan_table
from pipeline.costs import Cost, CostSettings, cost_of, cost_of_run, money, price_of, saved_seconds
from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.model.identity import identify_model
from pipeline.model.rates import remember_rates
from pipeline.report.sparks import draw_trend
from pipeline.report.trend import read_trend
from pipeline.run import plan_job, read_outcome, run_job, write_report
from pipeline.settings import JobSettings
from pipeline.storage.nights import read_nights
from tests.tiny_job import echo_settings, write_prompts

TWO = CostSettings(price_per_hour=2.0)


def test_a_cost_is_the_price_of_its_time() -> None:
    assert cost_of(TWO, 1800.0, 500, 3600.0) == Cost(2.0, 1.0, 2.0, 2.0)
    assert cost_of(TWO, 1800.0, 0, None) == Cost(2.0, 1.0, None, None)
    assert cost_of(TWO, None, 5, None) == Cost(2.0)
    assert cost_of(CostSettings(), 1800.0, 5, 1.0) is None


def test_reuse_saves_what_cached_tokens_would_have_taken() -> None:
    counters = {"prefilled_tokens": 100, "prefill_s": 5.0, "cached_tokens": 300, "wall_s": 36.0}
    assert saved_seconds(counters) == 15.0
    assert saved_seconds({"prefilled_tokens": 0, "prefill_s": 0.0, "cached_tokens": 3}) is None
    cost = cost_of_run(TWO, counters | {"rows_in": 10})
    assert cost is not None and cost.total == pytest.approx(0.02)
    assert cost.per_1000_rows == pytest.approx(2.0) and cost.saved == pytest.approx(15 / 1800)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234.50"), (1.0, "1.00"), (0.0123, "0.012"), (0.0, "0.00"), (None, "–")],
)
def test_money_is_shown_in_no_currency(value: float | None, shown: str) -> None:
    assert money(value) == shown


@pytest.mark.parametrize("price", ["0", "-1", "inf", "nan", "much"])
def test_a_price_that_is_none_is_refused(price: str) -> None:
    with pytest.raises(UsageError, match="price-per-hour: must be"):
        JobSettings.from_flat({"model": "m", "price_per_hour": price})


def test_a_plan_predicts_the_cost_by_the_rates_of_earlier_runs(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_prompts(tmp_path / "p.parquet", ["hello a", "hello b"])
    flat = {"model": str(model_folder), "max_new_tokens": 4, "price_per_hour": 3600.0}
    settings = JobSettings.from_flat(flat)
    unknown = plan_job(str(source), settings).summary.to_json()
    assert unknown["cost"]["total"] is None
    assert ("cost", "unknown until a run has measured this model here") in plan_table(unknown)
    counters = {"prefilled_tokens": 1000, "generated_tokens": 1000, "prefill_s": 100.0}
    identity = identify_model(settings.model)
    remember_rates(settings.model, identity, counters | {"decode_s": 1000.0})
    planned = plan_job(str(source), settings).summary.to_json()
    # 8 unique tokens of 14 at 10/s, 8 new ones at 1/s, one unit of money a second
    assert planned["cost"]["total"] == pytest.approx(0.8 + 8)
    assert planned["cost"]["per_1000_rows"] == pytest.approx(1000 * 8.8 / 2)
    assert planned["cost"]["saved"] == pytest.approx(0.6)
    said = dict(plan_table(planned))["cost"]
    assert said.startswith("at most 8.80, 4,400.00 per 1,000 rows; reuse saves 0.6 ")
    free = JobSettings.from_flat({k: v for k, v in flat.items() if k != "price_per_hour"})
    assert plan_job(str(source), free).summary.cost is None


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Location:
    source = write_prompts(tmp_path / "p.parquet", ["a", "b", "c", "d"])
    out = tmp_path / "night" / "2026-11-02"
    settings = echo_settings(tokenizer_folder, price_per_hour=3600.0)
    outcome = run_job(str(source), out, settings)
    told = outcome.to_json()
    assert told["cost"]["total"] == pytest.approx(told["counters"]["wall_s"])
    assert told["cost"]["per_1000_rows"] == pytest.approx(250 * told["counters"]["wall_s"])
    return Location(str(out))


def test_a_run_and_its_report_say_what_it_cost(run: Location) -> None:
    wall_s = json.loads((run.local / "run.json").read_text())["counters"]["wall_s"]
    told = read_outcome(run).to_json()
    assert told["cost"]["total"] == pytest.approx(wall_s)
    write_report(run)
    page = (run.local / "report.html").read_text()
    assert f'data-key="cost" data-value="{told["cost"]["total"]}"' in page
    assert "3,600.00 an hour" in (run.local / "report.md").read_text()
    write_report(run, CostSettings(price_per_hour=7200.0))
    assert f'data-value="{2 * told["cost"]["total"]}"' in (run.local / "report.html").read_text()


def test_without_a_price_nothing_is_said_of_money(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["a"])
    outcome = run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder))
    assert "cost" not in outcome.to_json()
    write_report(Location(str(tmp_path / "out")))
    assert 'data-key="cost"' not in (tmp_path / "out" / "report.html").read_text()


def test_nights_have_a_trend_of_costs(
    run: Location, tmp_path: Path, tokenizer_folder: Path
) -> None:
    source, above = str(tmp_path / "p.parquet"), run.local.parent
    run_job(source, above / "2026-11-01", echo_settings(tokenizer_folder))
    nights = read_trend(read_nights(run.local))
    assert nights[0].cost is None and nights[1].cost == pytest.approx(nights[1].wall_s)
    assert "cost" in [spark.name for spark in draw_trend(nights)]
    write_report(run)
    assert ">cost</th>" in (run.local / "report.html").read_text()


@pytest.mark.parametrize("said", [{"cost": {"price_per_hour": -1}}, {"cost": 5}, 7, {"cost": None}])
def test_a_price_that_was_written_by_a_stranger_is_none(said: Any) -> None:
    assert price_of({"settings": said}) == CostSettings()


def test_a_running_job_tells_its_cost(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["a", "b"])
    file = tmp_path / "m.prom"
    flat: dict[str, Any] = {"metrics_file": str(file), "price_per_hour": 3600.0}
    run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder, **flat))
    lines = dict(
        line.rsplit(" ", 1) for line in file.read_text().splitlines() if not line.startswith("#")
    )
    cost, elapsed = (
        float(next(v for k, v in lines.items() if k.startswith(f"coppice_{name}{{")))
        for name in ("cost", "elapsed_seconds")
    )
    assert cost == pytest.approx(elapsed) and cost > 0
