"""What `status` says of a run that is going on, finished, or was killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.job.status import read_status
from pipeline.run import run_job
from pipeline.settings import JobSettings
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
    assert read_status(unfinished)["status"] == "running"
    (unfinished / ".lock").write_text("process 1 on another-machine\n")
    assert read_status(unfinished)["status"] == "running"


def test_a_run_whose_process_died_is_stopped(unfinished: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (unfinished / ".lock").write_text(f"process {child.pid} on {socket.gethostname()}\n")
    state = read_status(unfinished)
    assert (state["status"], state["eta_s"]) == ("stopped", None)
    (unfinished / ".lock").write_text("")
    assert read_status(unfinished)["status"] == "stopped"
