"""Ends a job in which nothing moves: a device call, a disk or a thread that never comes back.

```
 quiet for the timeout ─► stacks of all threads into the log ─► the stages are cancelled
    ├─ every thread comes back within the grace time ─► `Stalled` is raised, the lock given back
    └─ one does not ─► the process leaves with the exit code of `Stalled`, as if it was killed
```

A thread inside a call that does not return cannot be interrupted, and must not be left alone: it
could write later into a folder that is somebody else's by then. So the whole process leaves, also
that of a library's caller; the operating system frees the lock, and the same command resumes. A
call that also keeps Python's own lock (the GIL) stops this thread as well; nothing here sees it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import Stalled
from pipeline.job.observer import Observer

_GRACE_S = 10.0
_LAST_WORDS_S = 5.0  # a log may be what is stuck
_POLLS = 20  # of the timeout
_LONGEST_POLL_S = 5.0
_CPU_S = 1.0  # of all threads: so much computing is movement where nothing is counted
_logger = logging.getLogger("coppice")


class Stillness:
    """For how many seconds nothing moved, of those in which this process ran.

    A step longer than `longest_s` was not one: the machine slept, or the process was stopped.
    """

    def __init__(self, now: float, longest_s: float) -> None:
        self._at = now
        self._longest_s = longest_s
        self._quiet_s = 0.0
        self._state: object = None

    def note(self, now: float, state: object) -> float:
        """Seconds of quiet until `now`; another `state` than before is movement."""
        step = min(now - self._at, self._longest_s)
        self._quiet_s = self._quiet_s + step if state == self._state else 0.0
        self._at, self._state = now, state
        return self._quiet_s


class Watchdog:
    """Watches one job from a thread of its own; `timeout_s` 0 never ends it.

    While a pulse is followed, what it counts is movement. Elsewhere (reading, planning, checking
    parts, sealing) it is that the process computes, so that a large input is no stall.
    """

    def __init__(self, timeout_s: float, observer: Observer) -> None:
        self.has_fired = False
        self._timeout_s = timeout_s
        self._observer = observer
        self._poll_s = min(timeout_s / _POLLS, _LONGEST_POLL_S)
        self._ended = threading.Event()
        self._is_excused = False
        self._pulse: Callable[[], object] | None = None
        self._cancel: Callable[[BaseException], None] | None = None
        self._cpu_s = time.process_time()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """From here to the end of the job."""
        if not self._timeout_s:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Meanwhile nothing needs to move: a model is loaded, a kernel is compiled."""
        self._is_excused = True
        try:
            yield
        finally:
            self._is_excused = False

    @contextmanager
    def following(
        self, pulse: Callable[[], object], cancel: Callable[[BaseException], None]
    ) -> Iterator[None]:
        """Meanwhile a change of `pulse()` is movement; `cancel` lets the stages come back."""
        self._pulse, self._cancel = pulse, cancel
        try:
            yield
        finally:
            self._pulse = self._cancel = None

    def _watch(self) -> None:
        stillness = Stillness(time.monotonic(), 2 * self._poll_s)
        while not self._ended.wait(self._poll_s):
            if stillness.note(time.monotonic(), self._state()) < self._timeout_s:
                continue
            self._end()
            return

    def _state(self) -> object:
        """Whatever changes when the job moves."""
        if self._is_excused:
            return object()
        pulse = self._pulse
        if pulse is not None:
            return pulse()
        now = time.process_time()
        if now - self._cpu_s >= min(_CPU_S, self._timeout_s / _POLLS):
            self._cpu_s = now
        return self._cpu_s

    def _end(self) -> None:
        """Let the job come back, or leave without it."""
        minutes = f"{self._timeout_s / 60:.3g} minutes"
        error = Stalled(
            f"nothing has moved for {minutes}; committed parts are intact, the same command goes "
            "on from here; if the device is only slow, give a longer --stall-timeout"
        )
        text, cancel = describe_threads(), self._cancel
        if cancel is not None:
            cancel(error)
        self.has_fired = True  # after the cancel: who stops because of it must find the error there
        _say_within(_LAST_WORDS_S, lambda: _log_lines(f"nothing has moved for {minutes}:\n{text}"))
        if not self._ended.wait(min(_GRACE_S, self._timeout_s)):
            _say_within(_LAST_WORDS_S, lambda: self._take_leave(error))
            os._exit(error.exit_code)

    def _take_leave(self, error: Stalled) -> None:
        self._observer.close()
        _logger.error("%s", error)
        sys.stderr.flush()


def describe_threads() -> str:
    """The stack of every thread, innermost call last: files, lines and names, no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}")
        stack = list(traceback.walk_stack(frame))
        lines += [f"  {f.f_code.co_filename}:{line} {f.f_code.co_name}" for f, line in stack[::-1]]
    return "\n".join(lines)


def _log_lines(text: str) -> None:
    """A record a line: no log lets a message break its lines."""
    for line in text.splitlines():
        _logger.error("%s", line)


def _say_within(seconds: float, say: Callable[[], None]) -> None:
    """Call `say`, but do not wait longer than that for it."""
    thread = threading.Thread(target=say, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
