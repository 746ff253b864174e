"""What `status` says of a run that is going on, finished, or was killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.job.observer import Planning, SilentObserver
from pipeline.job.planning_watch import PlanningWatch
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.status import read_status, wait_for_status
from tests.tiny_job import PROMPTS, write_prompts


@pytest.fixture
def unfinished(tmp_path: Path, settings: JobSettings) -> Path:
    """A run directory that says of itself that it is being worked on."""
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings)
    manifest = tmp_path / "out" / "run.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"status": "running"}))
    return tmp_path / "out"


def test_a_run_whose_process_lives_is_running(unfinished: Path) -> None:
    (unfinished / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert read_status(Location(unfinished))["status"] == "running"
    (unfinished / ".lock").write_text("process 1 on another-machine\n")
    assert read_status(Location(unfinished))["status"] == "running"


def test_a_run_whose_process_died_is_stopped(unfinished: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (unfinished / ".lock").write_text(f"process {child.pid} on {socket.gethostname()}\n")
    state = read_status(Location(unfinished))
    assert (state["status"], state["eta_s"]) == ("stopped", None)
    (unfinished / ".lock").write_text("")
    assert read_status(Location(unfinished))["status"] == "stopped"


def test_a_job_that_is_planned_says_so_before_it_has_a_folder(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: "holds no run", for as long as the plan took."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, out = write_prompts(tmp_path / "p.parquet", PROMPTS), tmp_path / "out"
    seen: list[dict[str, Any]] = []

    class Listener(SilentObserver):
        def show_planning(self, planning: Planning) -> None:
            seen.append(read_status(Location(out)) | {"exists": out.exists()})

    run_job(str(source), out, settings, Listener())
    assert (seen[0]["status"], seen[0]["exists"]) == ("planning", False)
    assert read_status(Location(out))["status"] == "complete"
    assert list((tmp_path / "cache").rglob("planning/*")) == []


def test_a_plan_whose_process_died_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    watch = PlanningWatch(SilentObserver(), Location(tmp_path / "out"))
    watch(Planning(100, 40, 0, 2.0))
    state = read_status(Location(tmp_path / "out"))
    assert (state["status"], state["rows"], state["rows_read"], state["eta_s"]) == (
        "planning", 100, 40, 3.0,
    )  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (note,) = (tmp_path / "cache").rglob("planning/*.json")
    owner = f"process {child.pid} on {socket.gethostname()}"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"owner": owner}))
    with pytest.raises(RunDirectoryError, match="holds no run"):
        read_status(Location(tmp_path / "out"))
    assert wait_for_status(Location(tmp_path / "out"))["status"] == "waiting"
