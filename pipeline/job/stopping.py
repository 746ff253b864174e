"""When a job has to end early: signals and the time budget. Knows nothing about rows or engines."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import CoppiceError, Interrupted, TimeBudgetReached

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while no `StopRequest` listens (planning, sealing) ends the job in a sentence.

    Serves as a decorator as well.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted: nothing that was committed is lost; the same command goes on from here"
        ) from None


class StopRequest:
    """First signal or spent budget: drain. Second signal: abort. Read from any thread.

    The engine sees an abort between two steps; a third signal ends a process whose step never ends.
    """

    def __init__(self, time_budget_s: float | None = None) -> None:
        self._deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
        self._num_signals = 0

    def should_drain(self) -> bool:
        """Admit no more rows; finish those on the device."""
        return self._num_signals > 0 or self._is_over_time()

    def should_abort(self) -> bool:
        """Leave at once; rows on the device are lost and will be run again."""
        return self._num_signals > 1

    def reason(self, rows_left: int) -> CoppiceError:
        """What to raise for a job that was stopped with `rows_left` rows to go."""
        left = f"{rows_left} rows are left; the same command goes on from here"
        if self._num_signals:
            return Interrupted(f"interrupted: {left}")
        return TimeBudgetReached(f"the time budget is spent: {left}")

    def check_budget(self) -> None:
        """Raises TimeBudgetReached where the time is over before the first row."""
        if self._is_over_time():
            raise TimeBudgetReached(
                "the time budget was spent before the device was free; "
                "the same command goes on from here"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM meanwhile; nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 2:
            os._exit(Interrupted.exit_code)

    def _is_over_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline
