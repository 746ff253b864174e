"""Calls of a place that may be slow or dead, from a thread of their own. Knows nothing of it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any


class Messenger:
    """Makes calls in their order and keeps nobody waiting; `on_error` hears of the first fault.

    The calls see the context variables of whoever made the messenger.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error: Callable[[Exception], None] | None = on_error
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        work = contextvars.copy_context().run
        self._thread = Thread(target=work, args=(self._work,), name="messenger", daemon=True)
        self._thread.start()

    @property
    def is_free(self) -> bool:
        """Whether no call waits for its turn."""
        return self._calls.empty()

    def send(self, call: Callable[[], Any]) -> None:
        """Make this call after those before."""
        self._calls.put(call)

    def finish(self, patience_s: float) -> None:
        """Wait so long for the calls that were sent; those that are left are lost."""
        self._calls.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # a message is worth no job
                if self._on_error is not None:
                    self._on_error(error)
                self._on_error = None
