"""The log as JSON: every line on stderr is one object, the last one of a failed command as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.logs import JsonObserver, log_to_stderr, make_observer
from pipeline.job.observer import Planning
from tests.cli.test_app import Shell
from tests.cli.test_progress import HALF
from tests.tiny_job import write_prompts


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_logs_objects_and_nothing_else(
    shell: Shell, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Seen red: with the observer of the terminal, whose lines are no JSON."""
    source = str(write_prompts(tmp_path / "p.parquet", ["hello", None]))
    job = (source, "-o", str(tmp_path / "out"), "--model", str(tokenizer_folder))
    assert shell("run", *job, "--engine", "echo", "--log-format", "json") == 3
    logged = records(shell.err)
    assert all({"at", "level", "event", "message"} <= record.keys() for record in logged)
    assert logged[0]["event"] == "say" and "2 rows" in logged[0]["message"]
    last = logged[-1]
    assert (last["event"], last["error"], last["exit_code"]) == ("error", "TooManyFailedRows", 3)
    assert "{" not in shell.out
    assert shell("status", str(tmp_path / "nowhere")) == 2
    assert shell.err.startswith("coppice: "), "the format of one command is not that of the next"


def test_progress_is_logged_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("json")
    observer = JsonObserver(every_s=0.0)
    observer.show(HALF)
    JsonObserver().show(HALF)
    observer.close()
    (logged,) = records(capsys.readouterr().err)
    log_to_stderr()
    assert logged["event"] == "progress" and logged["message"].startswith("600000/1000000 rows")
    assert (logged["rows_failed"], logged["rows_per_s"]) == (12, 25.0)
    assert logged["eta_s"] == pytest.approx(16_000.0)


def test_planning_is_logged_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("json")
    JsonObserver(every_s=0.0).show_planning(
        Planning(rows_done=300, rows_total=900, rows_before=0, elapsed_s=6.0)
    )
    (logged,) = records(capsys.readouterr().err)
    log_to_stderr()
    assert (logged["event"], logged["rows_done"], logged["eta_s"]) == ("planning", 300, 12.0)
    assert "300" in logged["message"]


def test_nobody_is_told_where_progress_is_off() -> None:
    assert not isinstance(make_observer("none", "json"), JsonObserver)
    assert isinstance(make_observer("plain", "json"), JsonObserver)
