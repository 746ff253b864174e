"""A crew in this process: real workers with real engines, in threads that can be lost at will.

A lost worker goes on in its thread, as one behind a broken network does; nobody hears it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from pipeline.engine.base import Engine
from pipeline.executor.base import Event, Lost, Order
from pipeline.executor.fleet import Fleet
from pipeline.executor.worker import Worker

MakeEngine = Callable[[int], Engine]
"""Called with the worker's place; an engine of its own each time."""


class ThreadCrew:
    """See `Crew`."""

    def __init__(self, size: int, make: MakeEngine) -> None:
        self.size = size
        self.notes = [f"{size} threads"]
        self.hired: list[int] = []
        self.sent: list[tuple[int, Order]] = []
        self.is_closed = False
        self._make = make
        self._pool = ThreadPoolExecutor(4 * size, thread_name_prefix="crew")
        self._workers: dict[int, Worker] = {}
        self._calls: dict[Future[Event], int] = {}
        self._lost: set[int] = set()

    def hire(self, worker: int) -> None:
        self.hired.append(worker)
        self._workers[worker] = Worker(lambda: self._make(worker))
        self._calls[self._pool.submit(self._workers[worker].start)] = worker

    def send(self, worker: int, order: Order) -> None:
        self.sent.append((worker, order))
        assert worker not in self._calls.values(), "a worker has one order at a time"
        self._calls[self._pool.submit(self._workers[worker].step, order)] = worker

    def receive(self, timeout_s: float) -> Sequence[tuple[int, Event]]:
        done, _ = wait(self._calls, timeout_s, FIRST_COMPLETED)
        return [self._event(self._calls.pop(call), call) for call in done]

    def _event(self, worker: int, call: Future[Event]) -> tuple[int, Event]:
        if worker in self._lost:
            self._lost.discard(worker)
            return worker, Lost("it was cut off")
        return worker, call.result()

    def lose(self, worker: int) -> None:
        """Its next word is its last."""
        self._lost.add(worker)

    def close(self) -> None:
        self.is_closed = True
        self._pool.shutdown(wait=False)


def fleets(usual: MakeEngine) -> Iterator[Callable[..., Fleet]]:
    """For a fixture: makes fleets of so many threads, of `usual` engines where nothing else is
    said; closes them all."""
    made: list[Fleet] = []

    def make(size: int, engine: MakeEngine = usual) -> Fleet:
        made.append(Fleet(ThreadCrew(size, engine)))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()
