"""An end for code that a stranger wrote and that Python runs: templates. Knows nothing about them.

A loop is ended between two of its steps; one long step (a huge multiplication) is waited for.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from typing import NamedTuple

_LOOKS_PER_LIMIT = 20


class TookTooLong(Exception):
    """The code within a `TimeLimit` did not end in time."""


class _Stretch(NamedTuple):
    """Code that runs now: in which thread, and until when it may."""

    thread: int
    until: float


class TimeLimit:
    """`with limit:` raises TookTooLong in the code within, after about `seconds`.

    For one thread at a time. `num_ended`: how often it had to.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.num_ended = 0
        self._running: _Stretch | None = None
        self._aimed_at: _Stretch | None = None  # the watcher is about to interrupt it
        self._done_with: _Stretch | None = None  # and has, or has left it alone
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
            self._watcher.start()
        self._running = _Stretch(threading.get_ident(), time.monotonic() + self.seconds)

    def __exit__(self, *_: object) -> None:
        # No lock: an interruption could leave it locked. The watcher announces whom it aims at
        # before it looks a second time, so whoever is not announced here will not be interrupted.
        stretch, self._running = self._running, None
        if self._aimed_at is stretch:
            while self._done_with is not stretch:
                time.sleep(0.001)
            _interrupt(threading.get_ident(), None)  # in case that it has not arrived yet
            self.num_ended += 1

    def look(self) -> None:
        """Interrupt what runs too long; called by the watcher."""
        stretch = self._running
        if stretch is None or time.monotonic() < stretch.until or stretch is self._aimed_at:
            return
        self._aimed_at = stretch
        if self._running is stretch:
            _interrupt(stretch.thread, TookTooLong)
        self._done_with = stretch


def _watch(reference: weakref.ref[TimeLimit]) -> None:
    """Look now and then for as long as somebody holds the limit."""
    while (limit := reference()) is not None:
        limit.look()
        pause = limit.seconds / _LOOKS_PER_LIMIT
        del limit  # or it would live for ever
        time.sleep(pause)


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    """Let the thread raise `error` before its next step; None: take back what has not arrived."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
