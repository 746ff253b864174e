"""The job that is tortured, and what must hold of its folder at any moment and at the end.

A plan with checkpoints, parts of four rows, duplicates, rows that cannot run, a column carried
through; the echo engine, whose answers are known.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from pipeline.engine.base import EngineFactory
from pipeline.engine.load import make_engine
from pipeline.inputs import parquet_input
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.status import read_status
from pipeline.storage.committed_parts import SUCCESS_NAME
from pipeline.storage.durable import is_temp
from pipeline.storage.lock import LOCK_NAME
from pipeline.storage.manifest import MANIFEST_NAME, notes_of
from pipeline.storage.run_directory import RunDirectory
from tests.tiny_job import answers, echo_settings, write_prompts

ROWS = 26
ROWS_PER_PART = 4
TIMES = ("queue_s", "prefill_s", "prefill_amortized_s", "decode_s", "ttft_s", "latency_s")
Content = dict[str, pl.DataFrame]


class Bench(Protocol):
    """A folder `base` in which a command works, `output` its run directory."""

    @property
    def base(self) -> Path: ...

    @property
    def output(self) -> Path: ...

    @property
    def most_wasted(self) -> int:
        """Answers of the device that a kill may cost."""
        ...

    def prepare(self) -> None:
        """Begin anew with what the command needs and nothing else."""

    def run(self) -> object:
        """The command, in this process."""

    def content(self) -> Content:
        """What the command has made, without what may differ from run to run."""

    def check_trusted(self) -> None:
        """Every file that a reader would believe is whole. Raises AssertionError and worse."""

    def check_finished(self, expected: Content, calls: int) -> None:
        """After so many calls, the last of them undisturbed, all is as it should be."""


@dataclass(frozen=True)
class RunBench:
    """A whole `run_job`; input, output and the user's cache lie below `base`."""

    base: Path
    model: Path
    changes: tuple[tuple[str, Any], ...] = ()
    make_engine: EngineFactory = make_engine

    @property
    def output(self) -> Path:
        """The job makes the folder above as well."""
        return self.base / "runs" / "out"

    @property
    def most_wasted(self) -> int:
        """A part that is being written and one that fills meanwhile; in the order of the input
        every part is open at once."""
        return ROWS if dict(self.changes).get("preserve_order") else 2 * ROWS_PER_PART + 1

    @property
    def settings(self) -> JobSettings:
        """Small parts, and failures allowed: two rows have no prompt."""
        flat = {"max_new_tokens": 5, "rows_per_part": ROWS_PER_PART, "fail_on_error": "2"}
        return echo_settings(self.model, **flat | dict(self.changes))

    def prepare(self) -> None:
        """Write the input, with a fixed date: what is kept of a plan knows it by that."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        prompts = [None if i % 13 == 5 else f"prompt {i % 11} of this" for i in range(ROWS)]
        path = self.base / "p.parquet"
        write_prompts(path, prompts, colour=[f"c{i}" for i in range(ROWS)])
        os.utime(path, (1, 1))

    def run(self) -> object:
        """Five rows a batch, a checkpoint of the plan every ten."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.base / "cache"))
            patch.setattr(parquet_input, "BATCH_ROWS", 5)
            patch.setattr(Checkpoint, "every_rows", 10)
            make = self.make_engine
            source = str(self.base / "p.parquet")
            return run_job(source, self.output, self.settings, make_engine=make)

    def content(self) -> Content:
        """Answers and plan."""
        return job_content(self.output)

    def check_trusted(self) -> None:
        """See `check_run`."""
        check_run(self.output)

    def check_finished(self, expected: Content, calls: int) -> None:
        """See `check_complete`."""
        check_complete(self.output, expected, calls)


def job_content(output: Path, *ignored: str) -> Content:
    """What a finished job says, without times, names of parts, and the columns `ignored`."""
    return {
        "answers": answers(output).drop(*TIMES, *ignored),
        "failed": pl.read_parquet(output / "failed.parquet").drop(*TIMES, *ignored),
        "plan": pl.read_parquet(output / "plan" / "plan.parquet"),
        "tree": pl.read_parquet(output / "plan" / "tree.parquet"),
    }


def check_run(output: Path) -> NDArray[np.int64]:
    """Every file of a run that a reader would believe is whole; returns the committed rows."""
    if not (output / "run.json").exists():
        assert not (output / "_SUCCESS").exists() and not list(output.glob("data/*.parquet"))
        return np.zeros(0, np.int64)
    for path in output.rglob("*"):
        if path.is_file() and not is_temp(path):
            check_whole(path)
    directory = RunDirectory.open(output)
    done = directory.done_rows()  # each part against its hash, each row once
    state = read_status(Location(output))
    assert state["rows_done"] == len(done)
    if directory.is_sealed:
        assert directory.is_whole and state["rows_left"] == 0
    return done


def num_answered(output: Path) -> int:
    """Answers of the engine that are committed; copies for equal prompts do not count."""
    if not (output / "run.json").exists():
        return 0
    ran = (pl.col("status") == "ok") & pl.col("dedup_of").is_null()
    return int(RunDirectory.open(output).scan().select(ran.sum()).collect().item())


def check_whole(path: Path) -> None:
    """Raises if the file is half of one. A line of metrics that ends is whole."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".jsonl": lambda path: [json.loads(x) for x in path.read_text().split("\n")[:-1]],
        ".parquet": pl.read_parquet,
        ".aside": pl.read_parquet,
        ".html": lambda path: _ends_with(path, "</html>"),
        ".md": _check_page,
    }
    if path.suffix:
        readers[path.suffix](path)
    elif path.name == SUCCESS_NAME:
        _ends_with(path, ".parquet")
    else:
        assert path.name == LOCK_NAME or path.stat().st_size == 0, path


def _check_page(path: Path) -> None:
    """It ends with a table, the audit, or the last word that a person should know of the run."""
    notes = notes_of(json.loads((path.parent / MANIFEST_NAME).read_bytes()))
    _ends_with(path, ("|", "alike.", *" ".join(notes).split()[-1:]))


def _ends_with(path: Path, end: str | tuple[str, ...]) -> None:
    assert path.read_text(encoding="utf-8").rstrip().endswith(end), path


def check_complete(output: Path, expected: Content, calls: int, *ignored: str) -> None:
    """A job that ended after so many calls says what an undisturbed one says, and nothing else."""
    rows = check_run(output)
    assert rows.tolist() == list(range(len(expected["answers"])))
    for name, frame in job_content(output, *ignored).items():
        assert frame.equals(expected[name]), name
    assert read_status(Location(output))["status"] == "complete"
    manifest = RunDirectory.open(output).read_manifest()
    assert manifest["counters"]["rows_in"] == len(rows)
    assert len(manifest["sessions"]) <= calls, "a session is recorded twice"
    assert (output / "README.md").exists() and (output / "_SUCCESS").exists()
    left = [path for path in output.rglob("*") if is_temp(path)]
    assert not left, left


def held_locks(base: Path) -> list[str]:
    """Locks below `base` that this process has not given back."""
    held = []
    for name in os.listdir("/proc/self/fd"):
        try:
            held.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    ours = os.path.realpath(base) + os.sep
    return [path for path in held if path.startswith(ours) and f"/{LOCK_NAME}" in path]
