"""Which workers there are: hired at the start, replaced when they die, for a bounded time.

Knows nothing about plans or pieces.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict

from pipeline import errors
from pipeline.engine.base import EngineCapabilities
from pipeline.errors import CoppiceError, EngineError
from pipeline.executor.base import Crew, Failure, Hello, Lost

RESUME = "committed parts are intact; the same command goes on from here"
_TICK_S = 0.5
_MOST_STARTS = 3  # of one place, without an answer in between
_PATIENCE_S = 600.0  # for a first worker, or for one after all were lost
_logger = logging.getLogger("coppice")


class Staff:
    """The workers of a crew. Raises what keeps the first one from loading its engine."""

    def __init__(self, crew: Crew) -> None:
        self.ready: set[int] = set()
        self.engine = ""
        self.capabilities = EngineCapabilities()
        self.notes = crew.notes
        self._crew = crew
        self._starting: set[int] = set()
        self._starts: dict[int, int] = defaultdict(int)
        self._last_reason = "none came up"
        self._without_since = time.monotonic()
        for worker in range(crew.size):
            self._hire(worker)
        while not self.ready:
            self.check()
            for worker, event in crew.receive(_TICK_S):
                assert isinstance(event, Hello | Lost)
                if isinstance(event, Hello) and event.failure is not None and not self.ready:
                    raise _error(event.failure)  # such as a model that is not there
                self.note(worker, event)

    def note(self, worker: int, event: Hello | Lost) -> None:
        """A worker has loaded its engine, or has not. Raises EngineError if nobody is left."""
        if isinstance(event, Lost):
            self.replace(worker, event.reason)
        elif event.failure is not None:
            self.replace(worker, event.failure.message)
        elif self.engine and event.engine != self.engine:
            # A self-test that failed on this machine alone: its rows would be computed otherwise.
            self.replace(worker, f"it has the {event.engine} engine, the others {self.engine}")
        else:
            self.notes = self.notes if self.engine else [*self.notes, *event.notes]
            self.engine, self.capabilities = event.engine, event.capabilities
            self._starting.discard(worker)
            self.ready.add(worker)

    def replace(self, worker: int, reason: str) -> None:
        """Start another one in its place. Raises EngineError if nobody is left."""
        _logger.warning("worker %d is lost: %s", worker, reason)
        self._last_reason = reason
        if self.ready == {worker}:
            self._without_since = time.monotonic()
        self.ready.discard(worker)
        self._starting.discard(worker)
        if self._starts[worker] < _MOST_STARTS:
            self._hire(worker)
        self.check()

    def forgive(self, worker: int) -> None:
        """It has worked, so what it may die of is not its place."""
        self._starts[worker] = 0

    def check(self) -> None:
        """Raises EngineError where nobody works and nobody is to be expected."""
        if self.ready:
            return
        if not self._starting:
            raise EngineError(f"no worker is left ({self._last_reason}); {RESUME}")
        waited = time.monotonic() - self._without_since
        if waited > _PATIENCE_S:
            raise EngineError(
                f"no worker has come up for {waited:.0f} s ({self._last_reason}); see whether the "
                f"cluster has room for one; {RESUME}"
            )

    def _hire(self, worker: int) -> None:
        self._starts[worker] += 1
        self._starting.add(worker)
        self._crew.hire(worker)


def _error(failure: Failure) -> CoppiceError:
    """The error of ours that a worker met."""
    kind = getattr(errors, failure.kind, EngineError)
    assert issubclass(kind, CoppiceError)
    return kind(failure.message)
