"""No command writes over a file that is not its own, unless it is asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import UsageError
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import echo_settings, write_prompts


def refused(*arguments: str | Path) -> str:
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(outcome.exception, UsageError), outcome.output
    return str(outcome.exception)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "plan.parquet", ["one", "two"])


@pytest.mark.fault(
    "a file in the way",
    injected="--metrics-file INPUT, plan -o over plan.parquet, --html INPUT, convert onto a file",
    outcome="UsageError before anything is read; the file stays",
)
def test_an_input_is_never_written_over(
    tmp_path: Path, source: Path, tokenizer_folder: Path
) -> None:
    """Seen red: each of them replaced it."""
    before = source.read_bytes()
    model: list[str | Path] = ["--model", tokenizer_folder, "--engine", "echo"]
    run: list[str | Path] = ["run", source, "-o", tmp_path / "out", *model]
    assert "holds something else" in refused(*run, "--metrics-file", source)
    assert "no plan of coppice" in refused("plan", source, *model, "-o", tmp_path)
    assert "holds something else" in refused("plan", source, *model, "--html", source)
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"prompt": "a"}) + "\n")
    assert "--overwrite" in refused("convert", lines, source)
    assert "there already" in refused("convert", lines, lines, "--overwrite")
    assert source.read_bytes() == before and not (tmp_path / "out").exists()
    assert (
        CliRunner().invoke(app, ["convert", str(lines), str(source), "--overwrite"]).exit_code == 0
    )
    assert source.read_bytes() != before


def test_a_place_that_takes_no_plan_is_said_before_a_row_is_read(
    tmp_path: Path, source: Path
) -> None:
    """Seen red: after the planning, "free or repair the disk"; the model is not even looked at."""
    for option, place in (("-o", source), ("-o", source / "below"), ("--html", source / "p.html")):
        said = refused("plan", source, "--model", "nowhere", option, place)
        assert f"plan.parquet is a file; choose another {option}" in said


def test_what_is_ours_is_replaced(tmp_path: Path, source: Path, tokenizer_folder: Path) -> None:
    page, metrics = tmp_path / "plan.html", tmp_path / "metrics.prom"
    model = ["--model", str(tokenizer_folder), "--engine", "echo"]
    for _ in range(2):
        plan = ["plan", str(source), *model, "-o", str(tmp_path / "p"), "--html", str(page)]
        outcome = CliRunner().invoke(app, plan)
        assert outcome.exception is None, outcome.output
        settings = echo_settings(tokenizer_folder, metrics_file=metrics, max_new_tokens=2)
        run_job(str(source), tmp_path / "out", settings)


def test_a_run_is_not_written_into_its_own_input(tmp_path: Path, settings: JobSettings) -> None:
    write_prompts(tmp_path / "a.parquet", ["one"])
    with pytest.raises(UsageError, match="is the input; choose another -o"):
        run_job(str(tmp_path), tmp_path, settings)
