"""One device, one job: who waits, who is told, and that nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import TimeBudgetReached, UsageError
from pipeline.job.device_lock import holding_device
from pipeline.job.observer import SilentObserver
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import PROMPTS, answers, write_prompts

_HOLD = """
import sys, time
from pipeline.job.device_lock import holding_device
from pipeline.job.observer import SilentObserver
from pipeline.settings import JobSettings
with holding_device(JobSettings.from_flat({"model": "m", "device": "cpu"}), SilentObserver()):
    print("held", flush=True)
    sys.stdin.read()
"""


class Heard(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COPPICE_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


@contextmanager
def another_job() -> Iterator[subprocess.Popen[str]]:
    """A process that has the CPU until its input ends."""
    command = [sys.executable, "-c", _HOLD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def job(model: Path, **flat: object) -> JobSettings:
    return JobSettings.from_flat(
        {"model": str(model), "device": "cpu", "max_new_tokens": 4, "ignore_eos": True} | flat
    )


@pytest.mark.fault(
    "the device is busy",
    injected="two runs on one device, from two processes",
    outcome="the second says whose turn it is, waits, and then runs",
)
def test_two_runs_on_one_device_queue(tmp_path: Path, model_folder: Path, locks: Path) -> None:
    """Seen red: without the lock the run ends while the other process holds the device."""
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    heard = Heard()
    ended = threading.Event()

    def run() -> None:
        run_job(str(source), tmp_path / "out", job(model_folder), heard)
        ended.set()

    with another_job() as other:
        thread = threading.Thread(target=run)
        thread.start()
        assert not ended.wait(3.0)
        first = f"the device cpu is in use by process {other.pid} on"
        assert any(line.startswith(first) for line in heard.lines)
        assert not list((tmp_path / "out").glob("data/*"))
        assert other.stdin is not None
        other.stdin.close()
        thread.join(60)
    assert ended.is_set() and len(answers(tmp_path / "out")) == len(PROMPTS)
    assert sum("waiting for it" in line for line in heard.lines) == 1


@pytest.mark.fault(
    "the device is busy",
    injected="kill -9 of the job that holds the device",
    outcome="the next one has it at once",
)
def test_nobody_waits_for_the_dead(locks: Path, model_folder: Path) -> None:
    with another_job() as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with holding_device(job(model_folder, busy_device="fail"), SilentObserver()):
            pass


def test_a_job_that_must_not_wait_says_so(tmp_path: Path, model_folder: Path, locks: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    with another_job():
        with pytest.raises(UsageError, match="--busy-device wait or share"):
            run_job(str(source), tmp_path / "out", job(model_folder, busy_device="fail"))
        assert not (tmp_path / "out").exists()
        run_job(str(source), tmp_path / "out", job(model_folder, busy_device="share"))
    assert len(answers(tmp_path / "out")) == len(PROMPTS)


def test_the_time_budget_counts_while_a_job_waits(
    tmp_path: Path, model_folder: Path, locks: Path
) -> None:
    """Seen red: without `check` the job waits until the other one ends."""
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    with another_job():
        with pytest.raises(TimeBudgetReached, match="before the device was free"):
            run_job(str(source), tmp_path / "out", job(model_folder, time_budget="1s"))


def test_a_waiting_job_that_gives_up_lets_its_thread_go(locks: Path, model_folder: Path) -> None:
    given_up = threading.Event()

    def wait() -> None:
        with pytest.raises(UsageError, match="has ended"):
            with holding_device(job(model_folder), SilentObserver(), lambda: None, given_up):
                pass

    with another_job():
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        given_up.set()
        thread.join(5)
        assert not thread.is_alive()


def test_a_link_in_the_folder_of_locks_empties_no_file(
    tmp_path: Path, locks: Path, model_folder: Path
) -> None:
    """Seen red: without O_NOFOLLOW the other file is emptied."""
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    locks.mkdir()
    os.symlink(precious, locks / "cpu.lock")
    with pytest.raises(UsageError, match="COPPICE_LOCKS"):
        with holding_device(job(model_folder), SilentObserver()):
            pass
    assert precious.read_text() == "keep me"


def test_other_users_may_take_the_lock_too(locks: Path, model_folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with holding_device(job(model_folder), SilentObserver()):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((locks / "cpu.lock").stat().st_mode) == 0o666


def test_an_audit_waits_for_its_turn_as_well(
    tmp_path: Path, model_folder: Path, locks: Path
) -> None:
    """Seen red: without the lock the audit ends while another job holds the device."""
    from pipeline.audit.auditing import audit_run
    from pipeline.settings import AuditSettings

    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", job(model_folder, busy_device="fail"))
    with another_job():
        with pytest.raises(UsageError, match="in use by"):
            audit_run(Location(tmp_path / "out"), AuditSettings())
