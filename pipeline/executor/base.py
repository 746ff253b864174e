"""What driver and workers say to each other, and what an executor is.

An executor is an engine: it takes a plan and yields a completion for each sequence, so session,
parts, resume and audit are the same wherever the device is. Workers return completions and no
part files: one writer in one process can promise that a row is committed once, many cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from pipeline.engine.base import EngineCapabilities, Grammars, StopCheck
from pipeline.engine.counters import EngineCounters
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn


@dataclass(frozen=True)
class Assignment:
    """A piece on its way: its number, its own plan, and how a stop string is seen (None: none),
    and what answers must be.

    `earlier`: by sequence of that plan, turns of its conversation that are answered already.
    """

    number: int
    plan: Plan
    is_stopped: StopCheck | None = None
    grammars: Grammars | None = None
    earlier: Mapping[int, tuple[EarlierTurn, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What the driver tells a worker. `share`: give back what has not begun and another worker
    better does, if that saves so much cost. `is_first`: of a plan; counts begin anew."""

    assignments: tuple[Assignment, ...] = ()
    share: int | None = None
    drain: bool = False
    is_first: bool = False


@dataclass(frozen=True)
class Answers:
    """Completions of a piece (`sequence` indexes its own plan), `run_s` seconds after its start."""

    number: int
    run_s: float
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Failure:
    """Why an engine gave up: the name of an error of ours with its message, or a fault's place."""

    kind: str
    message: str


@dataclass(frozen=True)
class Report:
    """What happened at a worker since its last report, in this order.

    `ended`: pieces. `given`: a piece and those of its sequences that are given back. `has_shared`:
    the wish to share is dealt with. `counters`: sums of this worker.
    """

    answers: tuple[Answers, ...] = ()
    given: tuple[tuple[int, tuple[int, ...]], ...] = ()
    has_shared: bool = False
    ended: tuple[int, ...] = ()
    counters: EngineCounters = field(default_factory=EngineCounters)
    failure: Failure | None = None


@dataclass(frozen=True)
class Hello:
    """A worker whose engine is loaded, or why it is not."""

    engine: str = ""
    capabilities: EngineCapabilities = EngineCapabilities()
    notes: tuple[str, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True)
class Lost:
    """A worker that will not answer any more, and why, in a few words without any text of a row."""

    reason: str


Event = Hello | Report | Lost


class Crew(Protocol):
    """Workers, wherever they are. Each says hello once, then a report for each order, or is lost.

    Called from one thread at a time.
    """

    size: int
    notes: list[str]

    def hire(self, worker: int) -> None:
        """Start a worker in this place, of `range(size)`; does not wait for it."""

    def send(self, worker: int, order: Order) -> None:
        """Tell a worker that has said hello and answered every order."""

    def receive(self, timeout_s: float) -> Sequence[tuple[int, Event]]:
        """What came in; waits so long for the first. Raises EngineError where all are cut off."""

    def close(self) -> None:
        """Let all go, in bounded time."""


def summed(counters: Iterable[EngineCounters]) -> EngineCounters:
    """Of several devices, see `EngineCounters`."""
    total = EngineCounters()
    for one in counters:
        for name in (f.name for f in fields(EngineCounters)):
            combine = max if name == "peak_kv_bytes" else sum
            setattr(total, name, combine((getattr(total, name), getattr(one, name))))
    return total
