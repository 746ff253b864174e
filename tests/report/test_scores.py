"""The section on scores: what was chosen, how much the model wanted it, where it was close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from pipeline.location import Location
from pipeline.plan_files import write_plan_page
from pipeline.report.scores import measure_scores
from pipeline.run import plan_job, run_job, write_report
from pipeline.storage.schema import OUTPUT_FIELDS, SCORE_FIELDS
from tests.test_scores import settings_of, write_rows
from tests.tiny_job import write_model, write_prompts


def output_of(rows: list[dict[str, Any]]) -> pl.LazyFrame:
    import pyarrow as pa

    schema = pa.schema([*OUTPUT_FIELDS, *SCORE_FIELDS])
    known: dict[str, Any] = {"status": "ok", "cut_tokens": 0}
    table = pa.Table.from_pylist(
        [known | {"id": f"r{i}", "row_index": i} | row for i, row in enumerate(rows)], schema=schema
    )
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()


def row(*probabilities: float, mass: float | None = None, **more: Any) -> dict[str, Any]:
    best = max(range(len(probabilities)), key=lambda i: probabilities[i])
    return {
        "choice_index": best,
        "probabilities": probabilities,
        "loglikelihoods": [-1.0] * len(probabilities),
        "token_counts": [1] * len(probabilities),
        "label_mass": mass,
    } | more


def test_rows_are_counted_by_choice_mass_and_margin() -> None:
    rows = [
        row(0.9, 0.1, mass=0.95),
        row(0.52, 0.48, mass=0.05),
        row(0.2, 0.8, mass=0.6, cut_tokens=3),
        row(1.0),
        {"status": "error"},
    ]
    found = measure_scores(output_of(rows), {"settings": {"scoring": {"choices": ["yes", "no"]}}})
    assert found is not None
    (one,) = found.chosen
    assert (found.rows, one.with_choices, found.scored_tokens, found.cut) == (4, 4, 7, 1)
    assert one.by_choice == (("1: 'yes'", 3), ("2: 'no'", 1))
    assert dict(one.by_mass)["90–99 %"] == dict(one.by_mass)["1–10 %"] == 1
    assert (one.low_mass, one.low_margin, found.perplexity) == (1, 1, None)
    assert one.closest[0][0] == "r1" and len(one.closest) == 3
    assert found.alarms[0].startswith("1 of 3 rows give all their choices")
    assert len(found.alarms) == 2
    unnamed = measure_scores(output_of(rows), {})
    assert unnamed is not None and unnamed.chosen[0].by_choice == (("1", 3), ("2", 1))


def test_other_runs_have_no_scores() -> None:
    assert measure_scores(pl.LazyFrame({"status": ["ok"]}), {}) is None


def test_pages_of_a_run_and_its_plan_say_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", sharpness=3.0)
    source = write_rows(tmp_path / "in.parquet")
    asked = settings_of(model, choices_column="choices")
    run_job(str(source), tmp_path / "out", asked)
    summary = write_report(Location(tmp_path / "out"))["summary"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="scores"' in page and "What was chosen" in page and "scored tokens" in summary
    write_plan_page(plan_job(str(source), asked), "in", tmp_path / "plan.html")
    assert "each distinct token once" in (tmp_path / "plan.html").read_text()
    prompts = write_prompts(tmp_path / "p.parquet", ["hello", "bye"])
    run_job(str(prompts), tmp_path / "whole", settings_of(model, prompt_logprobs=True))
    assert "perplexity of all prompts" in write_report(Location(tmp_path / "whole"))["summary"]
