"""Runs groups of stages in children: reads their lines, and kills what hangs. No torch.

A child says `{"begins": stage}` and `{"ends": stage, "seconds": ...}` around the rows of a stage.
One that dies or outlasts its box loses the stage it was at; the rest of its group goes on in
another child.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from benchmarks.gpu.plan import Stage

Say = Callable[[dict[str, Any]], None]
Command = Callable[[Sequence[str], float], list[str]]
"""Of a child that runs the stages of these names, so many seconds being left."""

_START_S = 45.0  # to import torch and to begin with the first stage
_END_S = 15.0  # to leave after the last one


class Journal:
    """Appends rows to a file, each on the disk before the call returns, and prints them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._begin = time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        line = json.dumps({"at_s": round(time.monotonic() - self._begin, 1)} | row)
        print(line, flush=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class Watch:
    """What children are started with, where their rows go, and when all must be over."""

    command: Command
    say: Say
    deadline: float  # of time.monotonic()

    def run(self, groups: Sequence[Sequence[Stage]]) -> bool:
        """Whether every stage ran to its end."""
        is_whole = True
        for group in groups:
            left = list(group)
            while left:
                late = [s for s in left if s.least_s > self._left_s()]
                for stage in late:
                    self.say({"stage": stage.name, "skipped": "no time is left"})
                left = [s for s in left if s not in late]
                done, is_sound = self._run_child(left) if left else (0, True)
                is_whole = is_whole and is_sound and not late
                left = left[done:]
        return is_whole

    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _run_child(self, stages: list[Stage]) -> tuple[int, bool]:
        """How many of the stages are over, and whether all of these went well."""
        command = self.command([s.name for s in stages], self._left_s())
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            try:
                done, is_sound, why = self._follow(child, stages)
            finally:
                _kill(child)
            if why is not None:
                errors.seek(0)
                self.say({"stage": stages[done].name, "failed": why, "said": _tail(errors)})
                return done + 1, False
        return done, is_sound

    def _follow(
        self, child: subprocess.Popen[str], stages: list[Stage]
    ) -> tuple[int, bool, str | None]:
        """Stages that are over, whether they went well, and why the next one did not end."""
        lines = _lines_of(child)
        done, is_sound = 0, True
        until = time.monotonic() + _START_S + stages[0].box_s
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(until, self.deadline) - time.monotonic()))
            except queue.Empty:
                return done, is_sound, None if done == len(stages) else "its time was over"
            if line is None:
                code = child.wait()
                return done, is_sound, None if done == len(stages) else f"its process left: {code}"
            row = _row_of(line)
            if row is None:
                continue
            if "begins" in row:
                until = time.monotonic() + stages[done].box_s
                continue
            self.say(row)
            is_sound = is_sound and "failed" not in row and "skipped" not in row
            if "ends" in row:
                done += 1
                rest = _START_S + stages[done].box_s if done < len(stages) else _END_S
                until = time.monotonic() + rest
                if row.get("leaves"):
                    return done, is_sound, None


def _lines_of(child: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Filled by a thread; None at the end."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    output: IO[str] = child.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _row_of(line: str) -> dict[str, Any] | None:
    """A line that is no row is what some library says."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _kill(child: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _tail(errors: IO[str], lines: int = 4) -> list[str]:
    return [line[-300:] for line in errors.read().splitlines() if line.strip()][-lines:]
