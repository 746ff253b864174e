"""How a session ends: crashes, signals, budgets, faults; and how the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, EngineCapabilities, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import (
    EngineError,
    Interrupted,
    RunDirectoryError,
    StorageError,
    TimeBudgetReached,
)
from pipeline.job.observer import SilentObserver, Snapshot
from pipeline.job.stopping import StopRequest
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import PROMPTS, FailingEngine, answers, echo_settings, on, write_prompts


@pytest.mark.parametrize("preserve_order", [False, True])
def test_a_crash_loses_no_committed_row_and_the_same_call_resumes(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    preserve_order: bool,
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [f"prompt {i % 37}" for i in range(60)])
    settings = echo_settings(tokenizer_folder, rows_per_part=4, preserve_order=preserve_order)

    def crash() -> None:
        deadline = time.monotonic() + 10
        while not any((tmp_path / "out" / "data").glob("part-*")) and not preserve_order:
            assert time.monotonic() < deadline, "the writer committed nothing"
            time.sleep(0.01)
        raise EngineError("the device fell over")

    engine = FailingEngine(30, crash)
    with pytest.raises(EngineError, match="fell over"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (manifest["status"], manifest["sessions"][0]["end"]) == ("failed", "EngineError")
    echo = EchoEngine()
    outcome = run_job(str(source), tmp_path / "out", settings, make_engine=on(echo))
    rows = answers(tmp_path / "out")
    assert rows["row_index"].to_list() == list(range(60))
    assert rows["generated_text"].to_list() == [f"prompt {i % 37}"[::-1] for i in range(60)]
    assert outcome.counters["rows_ok"] == 60
    if not preserve_order:
        assert echo.counters.num_forwards < 37


def test_a_plan_that_differs_on_resume_is_refused(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)

    def crash() -> None:
        raise EngineError("stop")

    engine = FailingEngine(0, crash)
    with pytest.raises(EngineError):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    summary = tmp_path / "out" / "plan" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"plan_hash": "0" * 64}))
    with pytest.raises(RunDirectoryError, match="planned differently"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))


def test_a_row_that_fails_in_the_engine_is_written_with_its_reason(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneBad(EchoEngine):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            for done in super().generate(plan, sequences, control):
                if done.sequence:
                    yield done
                else:
                    failed = Completion(0, (), "error", 0, done.timing, "OutOfMemory", "no room")
                    yield failed

    source = write_prompts(tmp_path / "p.parquet", ["a", "b"])
    engine = OneBad()
    run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows["error_type"].to_list() == ["OutOfMemory", None]
    assert rows["attempts"].to_list() == [1, 1]
    assert rows["generated_text"].to_list() == [None, "b"]


def test_a_spent_time_budget_commits_and_resumes(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    engine = FailingEngine(1, lambda: time.sleep(1.2))
    with pytest.raises(TimeBudgetReached, match="the same command"):
        run_job(
            str(source),
            tmp_path / "out",
            echo_settings(tokenizer_folder, time_budget=1.2),
            make_engine=on(engine),
        )
    assert 0 < answers(tmp_path / "out").height < 6
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["status"] == "stopped"
    echo = on(EchoEngine())
    run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder), make_engine=echo)
    assert answers(tmp_path / "out")["row_index"].to_list() == list(range(6))


@pytest.mark.fault(
    "SIGTERM",
    injected="in the middle of a run",
    outcome="rows on the device are finished and committed; exit code 130, resumable",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_commits(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    before = signal.getsignal(number)
    engine = FailingEngine(1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="rows are left"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    assert answers(tmp_path / "out").height > 0
    assert signal.getsignal(number) is before


def test_the_second_signal_aborts(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    engine = FailingEngine(1, interrupt_twice)
    with pytest.raises(Interrupted):
        run_job(
            str(source), tmp_path / "out", echo_settings(tokenizer_folder), make_engine=on(engine)
        )
    assert not list((tmp_path / "out" / "data").iterdir())


def test_the_third_signal_leaves_an_engine_that_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen red: a call of the device that never returns kept a process that was told thrice."""
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    stop = StopRequest()
    with stop.listening():
        for expected in ([], [], [130]):
            os.kill(os.getpid(), signal.SIGINT)
            assert left == expected


def test_an_error_of_the_writer_stops_the_engine_and_is_the_one_raised(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: Any) -> Path:
        raise StorageError("no space left on the disk")

    class Endless(EchoEngine):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            while True:
                yield from super().generate(plan, sequences, control)

    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    monkeypatch.setattr("pipeline.storage.run_directory.write_part", no_space)
    engine = Endless()
    with pytest.raises(StorageError, match="no space left"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    assert not [t for t in threading.enumerate() if t.name in ("writer", "ticker", "reader")]


def test_a_model_that_does_not_load_is_reported(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: JobSettings) -> EchoEngine:
        raise EngineError("no device")

    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    with pytest.raises(EngineError, match="no device"):
        run_job(str(source), tmp_path / "out", settings, make_engine=fail)


def test_the_observer_sees_the_last_row(tmp_path: Path, settings: JobSettings) -> None:
    class Listener(SilentObserver):
        def __init__(self) -> None:
            self.last: Snapshot | None = None

        def show(self, snapshot: Snapshot) -> None:
            self.last = snapshot

    listener = Listener()
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings, listener)
    assert listener.last is not None
    assert (listener.last.rows_done, listener.last.rows_total) == (6, 6)
    assert listener.last.saved_tokens == 22
    notes = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(notes[-1])["rows_done"] == 6


def test_an_engine_that_computes_a_token_twice_is_found_out(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wasteful(EchoEngine):
        capabilities = EngineCapabilities(computes_once=True)

    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    engine = Wasteful()
    with pytest.raises(EngineError, match="prompt tokens were prefilled where the plan says"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
