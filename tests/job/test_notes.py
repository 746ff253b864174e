"""What a person should know of a run reaches whoever looks for it, however it was begun."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import kvcoppice
from pipeline.cli.tables import status_table
from pipeline.job.observer import SilentObserver
from pipeline.location import Location
from pipeline.run import write_report
from pipeline.status import read_status
from tests.tiny_job import PROMPTS, write_prompts, write_tokenizer

UNUSED = "not used, though named like settings of a request: the columns n, temperature"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    columns: dict[str, list[Any]] = {"n": [7] * len(PROMPTS), "temperature": ["hot"] * len(PROMPTS)}
    return write_prompts(tmp_path / "p.parquet", PROMPTS, **columns)


def test_what_is_not_done_is_said_where_a_silent_caller_looks(
    tmp_path: Path, source: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red: a text column `temperature` was carried through, and only the progress said so."""
    with caplog.at_level(logging.INFO, "coppice"):
        run = kvcoppice.run(source, tmp_path / "out", model=model, engine="echo")
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == [UNUSED]
    informed = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert any(line.startswith("generation defaults") for line in informed)
    assert UNUSED in json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    state = read_status(Location(tmp_path / "out"))
    assert state["notes"] == list(run.notes) and UNUSED in run.notes
    assert ("note", UNUSED) in status_table(state)
    write_report(Location(tmp_path / "out"))
    for name in ("report.html", "report.md"):
        assert UNUSED in (tmp_path / "out" / name).read_text(), name


def test_a_complete_run_still_says_it(tmp_path: Path, source: Path, model: Path) -> None:
    first = kvcoppice.run(source, tmp_path / "out", model=model, engine="echo")
    again = kvcoppice.run(source, tmp_path / "out", model=model, engine="echo")
    assert again.was_complete and again.notes == first.notes and UNUSED in again.notes


def test_a_plan_says_it_before_the_run(source: Path, model: Path) -> None:
    assert UNUSED in kvcoppice.plan(source, model=model, engine="echo").notes


def test_who_left_the_kv_store_out_is_kept(tmp_path: Path, source: Path, model: Path) -> None:
    """A sibling: the store that was asked for does nothing, and only the progress said so."""
    store = tmp_path / "store"
    run = kvcoppice.run(source, tmp_path / "out", model=model, engine="echo", kv_store=store)
    assert "--kv-store is left out: the echo engine keeps no KV of prefixes" in run.notes


def test_a_silent_observer_logs_what_holds_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observer = SilentObserver()
    with caplog.at_level(logging.INFO, "coppice"):
        observer.say("5 of 9 rows")
        observer.note("two threads")
        observer.note("not used", is_warning=True)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "two threads"), ("WARNING", "not used"),
    ]  # fmt: skip
