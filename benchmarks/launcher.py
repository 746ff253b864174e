"""Runs one arm on one job in a process of its own, with a limit on its time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.job import Job, read_answers
from benchmarks.peers.environments import python_of
from benchmarks.scratch import ROOT, scratch

_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Outcome:
    """`answers`: one for each batch that was finished, in order; `failure`: why there are fewer."""

    answers: list[dict[str, Any]]
    failure: str | None


def run_arm(name: str, job: Job, limit_s: float) -> Outcome:
    """A fresh process; `limit_s` counts from its start, imports and loading included."""
    arm = ARMS[name]
    logs = scratch("logs")
    logs.mkdir(exist_ok=True)
    try:
        command, job, variables = arm.command(name), arm.fit(job), arm.variables()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Outcome([], shorten(f"could not be set up: {error}"))
    with tempfile.TemporaryDirectory() as folder, open(logs / f"{name}.log", "w") as log:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer.jsonl"
        job.write(asked)
        process = subprocess.Popen(
            [*command, str(asked), str(answered)],
            cwd=ROOT, env=os.environ | _own_caches() | variables,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        failure = wait_for(process, limit_s, Path(log.name))
        answers = read_answers(answered)
    if failure is None and len(answers) < len(job.batches):
        failure = "ended without an answer"
    return Outcome(answers, failure if len(answers) < len(job.batches) else None)


def ask_script(name: str, job: Any, arm: str, limit_s: float) -> tuple[str, str | None]:
    """What `peers/<name>.py` writes about a job of its own, by the interpreter of an arm; and why
    it is not whole, None where it is."""
    logs = scratch("logs")
    logs.mkdir(exist_ok=True)
    script = Path(__file__).with_name("peers") / f"{name}.py"
    with tempfile.TemporaryDirectory() as folder, open(logs / f"{name}.log", "w") as log:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer"
        asked.write_text(json.dumps(job))
        process = subprocess.Popen(
            [str(python_of(ARMS[arm].environment or "")), str(script), str(asked), str(answered)],
            env=os.environ | _own_caches() | ARMS[arm].variables(),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        failure = wait_for(process, limit_s, Path(log.name))
        return answered.read_text() if answered.exists() else "", failure


def must_run(name: str, job: Job, limit_s: float = 3600.0) -> dict[str, Any]:
    """The answer to a job of one batch. Raises RuntimeError if there is none."""
    return must_run_all(name, job, limit_s)[0]


def must_run_all(name: str, job: Job, limit_s: float = 3600.0) -> list[dict[str, Any]]:
    """The answers to all batches of a job. Raises RuntimeError if there are fewer."""
    outcome = run_arm(name, job, limit_s)
    if outcome.failure:
        raise RuntimeError(f"{name}: {outcome.failure}")
    return outcome.answers


def shorten(text: str) -> str:
    """A message for a table: one line, without folders and hosts of this machine."""
    line = re.sub(r"\w+://\S+", "…", " ".join(text.split()))
    line = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", line)
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _own_caches() -> dict[str, str]:
    """What engines compile for themselves is kept with the other things of the benchmark."""
    return {"VLLM_CACHE_ROOT": str(scratch("vllm-cache"))}


def wait_for(process: subprocess.Popen[bytes], limit_s: float, log: Path) -> str | None:
    """Why it failed, None if it did not. Ends the process with all that it started."""
    begin = time.perf_counter()
    try:
        code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"did not finish in {limit_s:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not code:
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\s*(\(.*?\))?\s*\w*(Error|Exception)\b", line)]
    said = (errors or lines or ["it said nothing"])[-1]
    return shorten(f"failed after {time.perf_counter() - begin:.0f} s (exit {code}): {said}")
