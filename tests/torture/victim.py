"""Processes that are killed: forked from a server that has imported everything, so they start fast.

The server itself computes nothing, for a library's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app as cli
from pipeline.engine import prefix_engine  # noqa: F401  (imported for the children, as the next)
from pipeline.job.channel import Channel
from pipeline.records import Completion
from tests.torture import audit_bench  # noqa: F401
from tests.torture.disk import DeadlyDisk, When
from tests.torture.job import Bench

ROOT = Path(__file__).resolve().parents[2]


def fork_server() -> ForkServerContext:
    """The context of the server; it is started by the first process."""
    os.environ["PYTHONPATH"] = str(ROOT)  # the server does not inherit `sys.path`
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices; threads would only wait for each other
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.torture.victim"])
    return context


class Server:
    """Starts victims and reads how many prompts they have answered."""

    def __init__(self) -> None:
        self._context = fork_server()
        self.answered: Synchronized[int] = self._context.Value("q", 0)

    def start(self, target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        """`target(*arguments, answered)` in a process of its own; the count begins at 0."""
        self.answered.value = 0
        process = self._context.Process(target=target, args=(*arguments, self.answered))
        process.start()
        return process


def die_at(bench: Bench, kill_at: int, when: When, answered: Synchronized[int]) -> None:
    """Run the command until operation `kill_at`."""
    _count_answers(answered)
    with pytest.MonkeyPatch.context() as patch:
        DeadlyDisk(patch, bench.base, kill_at, when)
        bench.run()


def run_command(arguments: tuple[str, ...], log: Path, answered: Synchronized[int]) -> None:
    """The command `coppice`, its words appended to `log`."""
    _count_answers(answered)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["coppice", *arguments]
    cli.main()


def _count_answers(answered: Synchronized[int]) -> None:
    """Let this process say how many prompts its engine has answered."""
    put: Callable[[Channel[Any], Any], None] = Channel.put

    def counted(channel: Channel[Any], item: Any) -> None:
        if isinstance(item, Completion):
            with answered.get_lock():
                answered.value += 1
        put(channel, item)

    setattr(Channel, "put", counted)  # noqa: B010  (mypy refuses an assignment)
