"""Calls that never return, in whole processes: each leaves, says why, and the command goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import run as run_module
from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job
from tests.tiny_job import on
from tests.torture.job import ROWS, RunBench, check_run
from tests.torture.victim import Server, run_command

TIMEOUT_S = 2.0


class StuckEngine(EchoEngine):
    """Answers ten prompts, then makes a call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        """As its base, until it is stuck."""
        for number, completion in enumerate(super().generate(plan, sequences, control)):
            if number == 10:
                time.sleep(0.3)  # the writer commits what it has
                self._call()
            yield completion


def _sleep_for_ever() -> None:
    time.sleep(1e6)


def _wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _stuck_device(call: Callable[[], object]) -> None:
    run_module.run_job = partial(run_job, make_engine=on(StuckEngine(call)))


def _stuck_disk(number: int) -> None:
    """The flush of the n-th part never returns; that of the mark of a complete job is number -1."""
    fsync, parts = os.fsync, [0]

    def flush(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        parts[0] += ".part-" in path
        if (".part-" in path and parts[0] == number) or (number == -1 and "_SUCCESS" in path):
            _sleep_for_ever()
        fsync(file)

    os.fsync = flush  # type: ignore[assignment]


STUCK: dict[str, tuple[Callable[..., None], tuple[object, ...], str]] = {
    "a device call that sleeps": (_stuck_device, (_sleep_for_ever,), "_sleep_for_ever"),
    "a device call that waits for a lock": (_stuck_device, (_wait_for_a_lock,), "_wait_for_a_lock"),
    "a part that is never flushed": (_stuck_disk, (3,), "thread writer"),
    "a seal that is never flushed": (_stuck_disk, (-1,), "seal"),
}


def stuck_command(
    name: str, arguments: tuple[str, ...], log: Path, answered: Synchronized[int]
) -> None:
    """`coppice`, with one of the calls above."""
    plant, values, _ = STUCK[name]
    plant(*values)
    run_command(arguments, log, answered)


@pytest.mark.parametrize("name", STUCK)
def test_a_call_that_never_returns_is_left(
    tmp_path: Path, tokenizer_folder: Path, server: Server, name: str
) -> None:
    """Seen red: without the watchdog each of them hangs until the test's own timeout."""
    bench, log = RunBench(tmp_path / "job", tokenizer_folder), tmp_path / "log"
    bench.prepare()
    arguments = (
        "run", str(bench.base / "p.parquet"), "-o", str(bench.output), "--model",
        str(tokenizer_folder), "--engine", "echo", "--rows-per-part", "4", "--fail-on-error", "2",
        "--stall-timeout", f"{TIMEOUT_S}s", "--progress", "none",
    )  # fmt: skip
    victim = server.start(stuck_command, name, arguments, log)
    victim.join(60)
    said = log.read_text()
    assert victim.exitcode == 1, said
    assert STUCK[name][2] in said and "thread watchdog" in said
    assert "coppice: nothing has moved for" in said and "--stall-timeout" in said
    assert "prompt 1" not in said
    committed = len(check_run(bench.output))
    assert committed == ROWS if name.startswith("a seal") else 4 <= committed < ROWS

    again = server.start(run_command, arguments, log)
    again.join(60)
    assert again.exitcode == 0, log.read_text()
    assert f"which process {victim.pid} on" in log.read_text()
    assert len(check_run(bench.output)) == ROWS


def test_a_stopped_process_is_not_a_stalled_one(
    tmp_path: Path, tokenizer_folder: Path, server: Server
) -> None:
    """As Ctrl-Z, or a container that is frozen, for three times the timeout.

    Seen red: with the time that passed instead of the steps that the watchdog made.
    """
    log = tmp_path / "log"
    victim = server.start(_slow_job, tmp_path, tokenizer_folder, log)
    deadline = time.monotonic() + 60
    while not server.answered.value:
        assert time.monotonic() < deadline and victim.is_alive()
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGSTOP)
    time.sleep(3 * TIMEOUT_S)
    os.kill(victim.pid, signal.SIGCONT)
    victim.join(60)
    assert victim.exitcode == 0, log.read_text()


def _slow_job(folder: Path, model: Path, log: Path, answered: Synchronized[int]) -> None:
    """Ten prompts, then half of the timeout without a step."""
    engine = StuckEngine(lambda: _count_and_wait(answered))
    bench = RunBench(folder / "job", model, (("stall_timeout", TIMEOUT_S),), on(engine))
    bench.prepare()
    bench.run()


def _count_and_wait(answered: Synchronized[int]) -> None:
    answered.value += 1
    time.sleep(TIMEOUT_S / 2)
