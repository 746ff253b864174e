"""Bounded channels between the threads of one job. Knows nothing about what flows through them.

```
 reader ──► Channel ──► this thread        engine ──► Channel ──► writer
```

A full channel holds its producer back, so the slowest stage sets the pace and memory stays bounded.
The first error in any stage closes every channel; it is the one that the caller gets to see.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ChannelClosed(Exception):
    """Another stage failed; this one has nothing left to do. Never leaves `Stages`."""


class Channel(Generic[T]):
    """A queue of at most `capacity` items with one producer and one consumer."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._finished = False
        self._cancelled = False

    def put(self, item: T) -> None:
        """Wait for room, then append. Raises ChannelClosed once the job is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._items) < self._capacity)
            if self._cancelled:
                raise ChannelClosed
            self._items.append(item)
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that no item follows; the consumer still gets those that wait."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Drop what waits and release both sides with ChannelClosed."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._cancelled or self._finished or self._items)
                if self._cancelled:
                    raise ChannelClosed
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class Stages:
    """The threads of one job, as a context: leaving it joins them and raises the first error."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._channels: list[Channel[Any]] = []
        self._lock = threading.Lock()
        self.ended = threading.Event()  # by the first error, or when the caller has no more work
        self._first_error: BaseException | None = None

    def channel(self, capacity: int) -> Channel[Any]:
        """Make a channel that ends with the job."""
        channel: Channel[Any] = Channel(capacity)
        self._channels.append(channel)
        return channel

    def start(self, name: str, stage: Callable[[], None]) -> None:
        """Run `stage` in a thread of its own."""
        thread = threading.Thread(target=self._run, args=(stage,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def cancel(self, error: BaseException) -> None:
        """Stop every stage; `error` is what the job raises if it is the first."""
        with self._lock:
            if self._first_error is None:
                self._first_error = error
        self.ended.set()
        for channel in self._channels:
            channel.cancel()

    def _run(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except ChannelClosed:
            return  # the error that closed the channel is already noted
        except BaseException as error:  # raised again in __exit__, in the caller's thread
            self.cancel(error)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, ChannelClosed):
            self.cancel(error)
        self.ended.set()
        for thread in self._threads:
            thread.join()
        if self._first_error is not None and self._first_error is not error:
            raise self._first_error from None
