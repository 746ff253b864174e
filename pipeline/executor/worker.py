"""One engine at work for a driver. Runs in whatever process the crew puts it; knows no cluster.

```
 step(order) ─► backlog ─► engine, in a thread ─► outbox ─► report
```

The engine is held back when the driver does not fetch what it has answered. What leaves here is
token ids, counts and places; the message of an unexpected error stays, it may quote a prompt.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, RunControl
from pipeline.engine.counters import EngineCounters
from pipeline.errors import CoppiceError, place_of
from pipeline.executor.base import Answers, Assignment, Failure, Hello, Order, Report, summed
from pipeline.executor.dispatch import not_worth_keeping
from pipeline.plan.shards import Costs
from pipeline.records import Completion

_LONGEST_WAIT_S = 0.5
_GATHER_S = 0.05  # a report costs a message, so what comes soon after the first goes with it
_MOST_HELD = 4096  # completions that wait for the driver


class Worker:
    """`start` once, then `step` again and again; both return."""

    def __init__(self, make: Callable[[], Engine], decode_weight: float = 1.0) -> None:
        self._make = make
        self._decode_weight = decode_weight
        self._changed = threading.Condition()
        self._backlog: deque[Assignment] = deque()
        self._running: _Run | None = None
        self._share: int | None = None
        self._is_draining = False
        self._outbox = _Outbox()
        self._past = EngineCounters()

    def start(self) -> Hello:
        """Load the engine, as this process would for a job of its own."""
        try:
            self._engine = self._make()
        except Exception as error:
            return Hello(failure=describe_failure(error))
        threading.Thread(target=self._work, name="engine", daemon=True).start()
        engine = self._engine
        return Hello(engine.name, engine.capabilities, tuple(engine.notes))

    def step(self, order: Order) -> Report:
        """Take an order; tell what happened since the last one, waiting a little for news."""
        with self._changed:
            self._take(order)
            self._changed.wait_for(lambda: self._outbox.has_news, _LONGEST_WAIT_S)
            self._changed.wait_for(lambda: self._outbox.is_urgent, _GATHER_S)
            running = [] if self._running is None else [self._engine.counters]
            report = self._outbox.report(summed([self._past, *running]))
            self._outbox = _Outbox()
            self._changed.notify_all()
            return report

    def _take(self, order: Order) -> None:
        if order.is_first:  # what an earlier call has left, also what is still on its way, is over
            self._past, self._outbox = EngineCounters(), _Outbox()
            self._running = self._share = None
            self._backlog.clear()
        self._backlog += order.assignments
        self._is_draining = order.drain
        if order.drain:
            self._outbox.ended += [assignment.number for assignment in self._backlog]
            self._backlog.clear()
        if order.share is not None:
            self._begin_to_share(order.share)
        self._changed.notify_all()

    def _begin_to_share(self, least_saved: int) -> None:
        """A piece that waits behind another is given back whole, as no engine has seen it; the
        only one never is: two workers without work would pass it to and fro."""
        ahead = len(self._backlog) + (self._running is not None)
        if not ahead:
            self._outbox.has_shared = True
        elif ahead == 1:
            self._share = least_saved  # the engine's thread goes on from here
        else:
            last = self._backlog.pop()
            self._outbox.give(last.number, range(len(last.plan.sequences)))
            self._outbox.ended.append(last.number)

    def _work(self) -> None:
        """The engine's thread."""
        try:
            while True:
                self._compute(*self._next())
        except Exception as error:
            with self._changed:
                self._outbox.failure = describe_failure(error)
                self._changed.notify_all()

    def _next(self) -> tuple[_Run, Iterator[Completion]]:
        """Counts of the engine are those of the piece from here on."""
        with self._changed:
            self._changed.wait_for(lambda: self._backlog)
            self._running = run = _Run(self._backlog.popleft())
            everything = np.arange(len(run.plan.sequences))
            hooks = NO_HOOKS if run.plan.conversations is None else run.hooks
            return run, self._engine.generate(run.plan, everything, self._control(run), hooks)

    def _compute(self, run: _Run, completions: Iterator[Completion]) -> None:
        for completion in completions:
            self._add(run, completion)
        with self._changed:
            if self._running is not run:
                return  # nobody waits for it any more
            if self._share is not None:
                self._give(run, ())
            self._past, self._running = summed([self._past, self._engine.counters]), None
            self._outbox.ended.append(run.number)
            self._changed.notify_all()

    def _control(self, run: _Run) -> RunControl:
        control = RunControl(
            should_drain=lambda: self._is_draining,
            wants_back=lambda: self._share is not None,
            take_back=lambda waiting: self._take_back(run, waiting),
        )
        control = replace(control, grammars=run.grammars)
        return control if run.is_stopped is None else replace(control, is_stopped=run.is_stopped)

    def _take_back(self, run: _Run, waiting: Sequence[int]) -> int:
        """Called by the engine: how many of those that wait, from the end, another one does."""
        costs = Costs(run.plan, self._decode_weight)
        unanswered = np.flatnonzero(~run.is_answered)
        assert self._share is not None
        chosen = not_worth_keeping(costs, unanswered, np.array(waiting, np.int64), self._share)
        with self._changed:
            self._give(run, chosen.tolist())
        return len(chosen)

    def _give(self, run: _Run, sequences: Sequence[int]) -> None:
        """Only with the lock."""
        self._share = None
        self._outbox.give(run.number, sequences)
        self._changed.notify_all()

    def _add(self, run: _Run, completion: Completion) -> None:
        is_last = completion.turn == run.plan.num_turns(completion.sequence) - 1
        run.is_answered[completion.sequence] = is_last
        with self._changed:
            self._changed.wait_for(lambda: self._outbox.num_completions < _MOST_HELD)
            if self._running is not run:
                return
            self._outbox.add(run, completion)
            self._changed.notify_all()


class _Run:
    """A piece on the device."""

    def __init__(self, assignment: Assignment) -> None:
        self.number, self.plan = assignment.number, assignment.plan
        self.is_stopped, self.grammars = assignment.is_stopped, assignment.grammars
        self.is_answered = np.zeros(len(assignment.plan.sequences), bool)
        self.start_s = time.perf_counter()
        earlier = assignment.earlier
        self.hooks = EngineHooks(earlier_turns=lambda sequence: earlier.get(sequence, ()))


class _Outbox:
    """A report in the making."""

    def __init__(self) -> None:
        self.num_completions = 0
        self.given: list[tuple[int, tuple[int, ...]]] = []
        self.has_shared = False
        self.ended: list[int] = []
        self.failure: Failure | None = None
        self._answers: dict[int, list[Completion]] = {}
        self._start_s: dict[int, float] = {}

    @property
    def has_news(self) -> bool:
        return bool(self._answers) or self.is_urgent

    @property
    def is_urgent(self) -> bool:
        """Somebody may have nothing to do because of it."""
        return bool(self.ended or self.has_shared or self.failure)

    def add(self, run: _Run, completion: Completion) -> None:
        self._answers.setdefault(run.number, []).append(completion)
        self._start_s[run.number] = run.start_s
        self.num_completions += 1

    def give(self, number: int, sequences: Sequence[int]) -> None:
        self.has_shared = True
        if sequences:
            self.given.append((number, tuple(sequences)))

    def report(self, counters: EngineCounters) -> Report:
        now = time.perf_counter()
        return Report(
            tuple(Answers(n, now - self._start_s[n], tuple(c)) for n, c in self._answers.items()),
            tuple(self.given),
            self.has_shared,
            tuple(self.ended),
            counters,
            self.failure,
        )


def describe_failure(error: Exception) -> Failure:
    """An error of ours with its message; of any other the place alone."""
    if isinstance(error, CoppiceError):
        return Failure(type(error).__name__, str(error))
    return Failure("EngineError", place_of(error))
