"""Whole commands with a real model, ended from outside: a few here, hundreds in `make torture`."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.torture.job import check_complete, check_run
from tests.torture.kills import MEASURED, expected_content, kill_until_done, tiny_job
from tests.torture.victim import Server, run_command


@pytest.mark.fault(
    "SIGKILL",
    injected="whole commands at random moments; hundreds in make torture",
    outcome="no row lost or doubled after the last call",
)
def test_a_command_outlives_kills_and_signals(
    tmp_path: Path, model_folder: Path, server: Server
) -> None:
    """kill -9 at random; then SIGTERM, SIGINT twice and kill -9 in the middle of the answers.

    Seen red: a row left out of each part's footer.
    """
    job = tiny_job(tmp_path, model_folder, rows=100)
    expected = expected_content(job, server)
    figures = kill_until_done(job, server, expected, random.Random(3), most_kills=5)
    assert (figures.rows_lost, figures.rows_twice) == (0, 0)
    assert figures.largest_waste_parts <= 2.1

    arguments, log = job.arguments(tmp_path / "signalled"), tmp_path / "signals"
    ends = []
    for signals in ([signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGKILL]):
        victim = server.start(run_command, arguments, log)
        _wait_for_answers(server)
        for number in signals:
            assert victim.pid is not None
            os.kill(victim.pid, number)
        victim.join(60)
        ends.append(victim.exitcode)
        check_run(tmp_path / "signalled")
    victim = server.start(run_command, arguments, log)
    killed = victim.pid
    victim.join(60)
    assert (ends, victim.exitcode) == ([130, 130, -signal.SIGKILL], 0), log.read_text()
    check_complete(tmp_path / "signalled", expected[0], 4, *MEASURED)
    said = log.read_text()
    assert said.count("interrupted: ") == 2 and "the same command goes on" in said
    assert said.count("took over the lock of") == 1 and f"process {killed}" not in said


def _wait_for_answers(server: Server) -> None:
    deadline = time.monotonic() + 60
    while not server.answered.value:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.002)
