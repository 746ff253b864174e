"""A job in which nothing moves is ended; a slow, a sleeping and a busy one are not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import Stalled
from pipeline.job.observer import SilentObserver
from pipeline.job.watchdog import Stillness, Watchdog, describe_threads
from pipeline.location import Location
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.status import read_status
from tests.tiny_job import PROMPTS, FailingEngine, answers, echo_settings, on, write_prompts


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which this process would have left: a test must not end all of them."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


def test_quiet_adds_up_until_something_moves() -> None:
    still = Stillness(now=0.0, longest_s=2.0)
    assert [still.note(t, "a") for t in (1.0, 2.0, 3.0)] == [0.0, 1.0, 2.0]
    assert [still.note(t, "b") for t in (4.0, 5.0)] == [0.0, 1.0]


def test_a_machine_that_slept_was_not_quiet() -> None:
    """Seen red: an hour's sleep counted as an hour without progress."""
    still = Stillness(now=0.0, longest_s=2.0)
    still.note(1.0, "a")
    assert still.note(3601.0, "a") == 2.0


class Looping(EchoEngine):
    """Answers three prompts, then does nothing for ever, but asks whether it should stop."""

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for number, completion in enumerate(super().generate(plan, sequences, control)):
            while number == 3 and not control.should_abort():
                time.sleep(0.01)
            yield completion


def test_a_job_whose_threads_come_back_raises_and_goes_on_later(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the process of a library's caller: an error, a free lock, and no thread left behind."""
    source = write_prompts(tmp_path / "p.parquet", [*PROMPTS])
    settings = echo_settings(tokenizer_folder, rows_per_part=2, stall_timeout="1s")
    engine = Looping()
    with (
        caplog.at_level(logging.ERROR, "coppice"),
        pytest.raises(Stalled, match="--stall-timeout") as caught,
    ):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine))
    assert caught.value.exit_code == 1 and "same command" in str(caught.value)
    assert "thread writer" in caplog.text and "test_watchdog.py" in caplog.text
    assert read_status(Location(tmp_path / "out"))["status"] == "failed"
    assert not [t for t in threading.enumerate() if t.name in ("writer", "ticker", "watchdog")]
    committed = answers(tmp_path / "out").height
    assert committed >= 2
    run_job(str(source), tmp_path / "out", settings, make_engine=on(EchoEngine()))
    assert answers(tmp_path / "out")["row_index"].to_list() == list(range(6))


@pytest.mark.parametrize("timeout", ["1s", "0", "none"])
def test_a_model_that_loads_slowly_is_no_stall(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    exits: list[int],
    timeout: str,
) -> None:
    """Seen red: without `excused`."""

    def load(settings: JobSettings) -> EchoEngine:
        time.sleep(3.0 if timeout == "1s" else 0.1)
        return EchoEngine()

    source = write_prompts(tmp_path / "p.parquet", [*PROMPTS])
    settings = echo_settings(tokenizer_folder, stall_timeout=timeout)
    done = run_job(str(source), tmp_path / "out", settings, make_engine=load)
    assert done.counters["rows_ok"] == 6 and not exits


def test_steps_without_an_answer_are_movement(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long answer counts its tokens. Seen red: a pulse of rows alone."""
    engine = FailingEngine(1, lambda: None)

    def decode() -> None:
        for _ in range(15):
            time.sleep(0.2)
            engine.counters.generated_tokens += 1

    engine._act = decode
    source = write_prompts(tmp_path / "p.parquet", [*PROMPTS])
    settings = echo_settings(tokenizer_folder, stall_timeout="1.5s")
    assert (
        run_job(str(source), tmp_path / "out", settings, make_engine=on(engine)).counters["rows_ok"]
        == 6
    )


def test_planning_that_computes_is_movement(exits: list[int]) -> None:
    """Seen red: a large input that was only read and sorted for longer than the timeout."""
    with Watchdog(0.6, SilentObserver()).watching():
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            sum(range(1000))
    assert not exits


def test_a_call_that_does_not_return_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no stage could be cancelled, and where the log itself is stuck."""
    ended = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    class StuckObserver(SilentObserver):
        def close(self) -> None:
            threading.Event().wait(60)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("pipeline.job.watchdog._LAST_WORDS_S", 0.1)
    with Watchdog(0.4, StuckObserver()).watching():
        assert ended.wait(20)
    assert codes == [Stalled.exit_code]


def test_stacks_hold_no_values() -> None:
    """A canary in a local variable of a frame that is shown."""

    def wait(prompt: str) -> str:
        return describe_threads()

    shown = wait("canary 7461 sings")
    assert "thread MainThread" in shown and " wait" in shown and "canary 7461" not in shown


def test_never_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Watchdog(0.0, SilentObserver()).watching():
        pass
