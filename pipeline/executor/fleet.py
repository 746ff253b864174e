"""An engine made of many workers: deals the plan out, brings the answers home, survives losses.

```
 plan ─► Dispatch ─► orders ─► crew ─► workers, one engine each
                        ▲                 │
 completions ◄──────────┴──── reports ◄───┘
```

All decisions are made here, in the process that also writes the parts: it alone knows what is
answered, and where it dies the job ends with it anyway. A worker that dies costs what it had not
answered, and is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, EngineCapabilities, EngineHooks, Indices, RunControl
from pipeline.engine.counters import EngineCounters
from pipeline.errors import EngineError
from pipeline.executor.base import Answers, Assignment, Crew, Event, Order, Report, summed
from pipeline.executor.conversations import TurnsOnTheWay
from pipeline.executor.dispatch import Dispatch, Piece
from pipeline.executor.staff import RESUME, Staff
from pipeline.plan.plan import Plan
from pipeline.plan.subplan import carve, only, prefill_tokens
from pipeline.records import Completion, Timing

_TICK_S = 0.5
_PIECES_AHEAD = 2  # one on the device and one for the moment at which it ends


class Fleet:
    """An `Engine` over a crew. Raises what keeps the first worker from loading its engine."""

    def __init__(self, crew: Crew, decode_weight: float = 1.0) -> None:
        """`decode_weight`: predicted cost of a new token, in prefilled tokens."""
        self.counters = EngineCounters()
        self.crew = crew
        self.decode_weight = decode_weight
        self.staff = Staff(crew)
        self.busy: set[int] = set()
        """Workers that have an order to answer, from an earlier call too."""
        self.name = self.staff.engine
        self.notes = self.staff.notes

    @property
    def capabilities(self) -> EngineCapabilities:
        """What the workers can do, but for what would have to cross the network."""
        known = self.staff.capabilities
        return EngineCapabilities(
            known.computes_once,
            known.replays_noise,
            carries_conversations=known.carries_conversations,
            evicts=known.evicts,
            reads_scores=known.reads_scores,
            guides=known.guides,
            gives_logprobs=known.gives_logprobs,
        )

    def generate(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Raises EngineError where no worker is left or none gets on."""
        self.capabilities.check(plan, hooks)
        self.counters = EngineCounters()
        if not len(sequences):
            return iter(())
        return _Sitting(self, plan, sequences, control, hooks).completions()

    def close(self) -> None:
        """Let the workers go, in bounded time also where they do not answer."""
        self.crew.close()


class _Sitting:
    """The state of one `generate` call."""

    def __init__(
        self,
        fleet: Fleet,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks,
    ) -> None:
        self._fleet = fleet
        self._crew = fleet.crew
        self._staff = fleet.staff
        self._whole = plan
        self._plan = only(plan, sequences)
        self._sequences = sequences
        self._control = control
        self._turns = TurnsOnTheWay(plan, hooks)
        self._work = Dispatch(self._plan, fleet.crew.size, fleet.decode_weight)
        self._is_stopped = control.is_stopped if any(p.stop for p in plan.params) else None
        is_guided = any(p.is_guided for p in plan.params)
        self._grammars = control.grammars if is_guided else None
        self._start = time.monotonic()
        self._pieces: dict[int, Piece] = {}
        self._began_s: dict[int, float] = {}  # by piece, after `_start`
        self._busy = fleet.busy
        self._of_earlier = set(fleet.busy)  # their next report is not ours
        self._to_ask: set[int] = set()
        self._asked: set[int] = set()
        self._counters: dict[int, EngineCounters] = {}
        self._of_the_lost = EngineCounters()
        self._answered_in = np.full(len(sequences), -1)  # by position: the number of the piece
        self._losses_in_a_row = 0

    def completions(self) -> Iterator[Completion]:
        """The driver's loop."""
        while not (self._control.should_abort() or self._work.is_over):
            is_draining = self._control.should_drain()
            if is_draining and not self._computing():
                break
            self._send_orders(is_draining)
            for worker, event in self._crew.receive(_TICK_S):
                self._busy.discard(worker)
                if not self._is_of_earlier(worker, event):
                    yield from self._handle(worker, event, is_draining)
            self._staff.check()
        self._of_the_lost.replicated_tokens = self._replicated_tokens()
        self._count()

    def _is_of_earlier(self, worker: int, event: Event) -> bool:
        """Whether it answers an order of an earlier call, and the worker is well."""
        if worker not in self._of_earlier:
            return False
        self._of_earlier.discard(worker)
        return isinstance(event, Report) and event.failure is None

    def _replicated_tokens(self) -> int:
        """Prompt tokens that answers needed in each of several pieces, but for once each.

        Counted here and at the end: the last answers come home before their workers say that they
        are through."""
        once = self._tokens_of(self._answered_in >= 0)
        numbers = np.unique(self._answered_in[self._answered_in >= 0])
        return sum(self._tokens_of(self._answered_in == number) for number in numbers) - once

    def _tokens_of(self, is_chosen: NDArray[np.bool_]) -> int:
        return prefill_tokens(self._whole, self._sequences[is_chosen])

    def _computing(self) -> list[int]:
        return [worker for worker in self._staff.ready if self._work.held(worker)]

    def _send_orders(self, is_draining: bool) -> None:
        free = sorted(self._staff.ready - self._busy)
        taken: dict[int, list[Piece]] = {worker: [] for worker in free}
        for most in range(1, _PIECES_AHEAD + 1):  # everybody gets a first before anybody a second
            for worker in [] if is_draining else free:
                if self._work.held(worker) < most and (piece := self._work.take(worker)):
                    taken[worker].append(piece)
        self._choose_whom_to_ask()
        for worker in free:
            if self._work.held(worker):
                self._send(worker, taken[worker], is_draining)

    def _choose_whom_to_ask(self) -> None:
        """As many as there are workers with nothing to do."""
        if self._work.has_waiting:
            return
        idle = len(self._staff.ready) - len(self._computing())
        while len(self._to_ask) + len(self._asked) < idle:
            worker = self._work.candidate()
            if worker is None:
                return
            self._to_ask.add(worker)

    def _send(self, worker: int, pieces: list[Piece], is_draining: bool) -> None:
        share = self._work.least_saved if worker in self._to_ask else None
        if share is not None:
            self._to_ask.discard(worker)
            self._asked.add(worker)
        assignments = []
        for piece in pieces:
            self._pieces[piece.number] = piece
            plan = carve(self._plan, piece.positions)
            earlier = self._turns.earlier(self._sequences[piece.positions])
            assignments.append(
                Assignment(piece.number, plan, self._is_stopped, self._grammars, earlier)
            )
        self._busy.add(worker)
        is_first = worker not in self._counters
        self._counters.setdefault(worker, EngineCounters())
        self._crew.send(worker, Order(tuple(assignments), share, is_draining, is_first))

    def _handle(self, worker: int, event: Event, is_draining: bool) -> Iterator[Completion]:
        if isinstance(event, Report):
            yield from self._read(worker, event, is_draining)
            if event.failure is not None:
                yield from self._lose(worker, event.failure.message)
        elif worker in self._staff.ready:
            yield from self._lose(worker, getattr(event, "reason", "it began anew by itself"))
        else:
            self._staff.note(worker, event)

    def _read(self, worker: int, report: Report, is_draining: bool) -> Iterator[Completion]:
        self._counters[worker] = report.counters
        self._count()
        for answers in report.answers:
            self._losses_in_a_row = 0
            self._staff.forgive(worker)
            yield from self._bring_home(worker, answers)
        for number, given in report.given:
            positions = self._pieces[number].positions[np.array(given, np.int64)]
            self._work.give_back(worker, number, positions)
        if report.has_shared:
            self._asked.discard(worker)
        for number in report.ended:
            del self._pieces[number]
            rest = self._work.end(worker, number)
            if len(rest) and not is_draining:
                raise EngineError(
                    f"worker {worker} ended a piece with {len(rest)} rows unanswered; this is a "
                    f"fault in coppice, please report it; {RESUME}"
                )

    def _bring_home(self, worker: int, answers: Answers) -> Iterator[Completion]:
        """Completions as of one engine that began when this sitting did."""
        seen_s = max(0.0, time.monotonic() - self._start - answers.run_s)
        began_s = min(seen_s, self._began_s.get(answers.number, seen_s))
        self._began_s[answers.number] = began_s
        positions = self._pieces[answers.number].positions
        for completion in answers.completions:
            position = int(positions[completion.sequence])
            sequence = int(self._sequences[position])
            if self._turns.have_failed(sequence):
                continue
            if self._turns.note(sequence, completion):
                self._work.answer(worker, answers.number, position)
                self._answered_in[position] = answers.number
            timing = _later(completion.timing, began_s)
            yield replace(completion, sequence=sequence, timing=timing)
            if completion.finish_reason == "error":
                yield from self._turns.after(sequence, completion.turn)

    def _lose(self, worker: int, reason: str) -> Iterator[Completion]:
        """What it had not answered waits again, but for a sequence of which too many have died."""
        self._to_ask.discard(worker)
        self._asked.discard(worker)
        if self._work.held(worker):
            self._staff.forgive(worker)  # pieces have a limit of their own
        given_up = self._work.lose(worker)
        ended_with = self._counters.pop(worker, EngineCounters())
        lost = EngineCounters(lost_workers=1)
        self._of_the_lost = summed([self._of_the_lost, ended_with, lost])
        self._count()
        self._losses_in_a_row = 0 if len(given_up) else self._losses_in_a_row + 1
        if self._losses_in_a_row > 3 * self._crew.size + 8:
            raise EngineError(
                f"{self._losses_in_a_row} workers were lost without an answer in between "
                f"({reason}); {RESUME}"
            )
        for sequence in self._sequences[given_up].tolist():
            yield from self._turns.given_up(sequence)
        self._staff.replace(worker, reason)

    def _count(self) -> None:
        self._fleet.counters = summed([self._of_the_lost, *self._counters.values()])


def _later(timing: Timing, seconds: float) -> Timing:
    return replace(
        timing,
        queue_s=timing.queue_s + seconds,
        ttft_s=timing.ttft_s + seconds,
        latency_s=timing.latency_s + seconds,
    )
