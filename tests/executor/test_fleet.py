"""A fleet of threads against one engine: same answers, exact counts, and what becomes of losses."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.engine import prefix_run
from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.scheduler import Scheduler
from pipeline.errors import EngineError, ModelError
from pipeline.executor import staff
from pipeline.executor.fleet import Fleet
from pipeline.plan.plan import Plan
from pipeline.plan.subplan import carve, only, prefill_tokens
from pipeline.records import Completion, SamplingParams
from pipeline.settings import EngineSettings
from tests.engine.tiny import GREEDY, LONGER, SAMPLED, load_tiny, plan_of, random_prompts
from tests.executor.thread_crew import ThreadCrew, fleets
from tests.plan.edges import edge_token_ids

_SEED = threading.Lock()  # models are drawn from torch's own, shared state


def tiny_engine(max_rows: int = 8, kv_tokens: int | None = None) -> PrefixEngine:
    with _SEED:
        loaded = load_tiny()
    budget = None if kv_tokens is None else kv_tokens * loaded.shape.kv_bytes_per_token()
    return PrefixEngine(loaded, EngineSettings(max_rows=max_rows, kv_budget=budget))


def mixed_plan(rows: int = 60) -> Plan:
    prompts = random_prompts(random.Random(3), rows)
    return plan_of(prompts, (GREEDY, LONGER, SAMPLED), [i % 3 for i in range(rows)])


def run(engine: Engine, plan: Plan, chosen: NDArray[np.int64] | None = None) -> list[Completion]:
    sequences = np.arange(len(plan.sequences)) if chosen is None else chosen
    return list(engine.generate(plan, sequences, RunControl()))


def answers(completions: list[Completion]) -> dict[int, tuple[int, ...]]:
    """By sequence; each may come once."""
    found = {c.sequence: c.token_ids for c in completions}
    assert len(found) == len(completions), "a sequence was answered twice"
    return found


@pytest.fixture
def fleet_of() -> Iterator[Callable[..., Fleet]]:
    yield from fleets(lambda worker: tiny_engine())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_fleet_answers_as_one_engine_and_counts_every_token(
    fleet_of: Callable[..., Fleet], size: int
) -> None:
    """Greedy and sampled, all and some of the sequences: tokens equal, prefill exact."""
    plan, fleet = mixed_plan(), fleet_of(size)
    some = np.arange(len(plan.sequences))[::2]
    for chosen in (None, some):
        alone, together = tiny_engine(), run(fleet, plan, chosen)
        assert answers(together) == answers(run(alone, plan, chosen))
        counted, once = fleet.counters, alone.counters.prefilled_tokens
        assert counted.prefilled_tokens == once + counted.replicated_tokens
        assert counted.cached_tokens == alone.counters.cached_tokens - counted.replicated_tokens
        assert counted.generated_tokens == alone.counters.generated_tokens
        assert (counted.replicated_tokens > 0) == (size > 1) and not counted.lost_workers
    assert fleet.name == "prefix" and "threads" in fleet.notes[0]


@pytest.mark.parametrize("chosen", [slice(None), slice(10, 40), slice(3, None, 7)])
def test_a_carved_plan_needs_what_the_whole_one_needs(chosen: slice) -> None:
    """Prompt by prompt, and token by token of what must be computed."""
    whole = mixed_plan()
    plan = only(whole, np.arange(len(whole.sequences))[5:])
    sequences = np.arange(len(plan.sequences))[chosen]
    part = carve(plan, sequences)
    assert part.tree.unique_tokens == prefill_tokens(plan, sequences)
    for place, sequence in enumerate(sequences.tolist()):
        ours, theirs = part.prompt_token_ids(place), plan.prompt_token_ids(sequence)
        assert ours.tolist() == theirs.tolist()
        path = part.tree.path(int(part.tree.terminal[part.sequences.prompt[place]]))
        assert sum(int(part.tree.edge_lengths[node]) for node in path) == len(ours)
        at = [edge_token_ids(part, node).tolist() for node in path]
        assert [token for edge in at for token in edge] == ours.tolist()
    assert (part.sequences.noise_key == plan.sequences.noise_key[sequences]).all()
    counts = part.count_below(np.arange(len(sequences)))
    assert (counts > 0).all()


def test_times_count_from_the_beginning_of_the_job(fleet_of: Callable[..., Fleet]) -> None:
    """The second piece of a worker began later; its rows say so."""
    begin = time.monotonic()
    completions = run(fleet_of(1), mixed_plan(120))
    span = time.monotonic() - begin
    latencies = [c.timing.latency_s for c in completions]
    assert 0 < min(latencies) and max(latencies) <= span
    assert max(c.timing.queue_s for c in completions) > 0.3 * max(latencies)


@dataclass
class Gate:
    """An engine that stops before the sequence at which it is told to, until it is opened."""

    at: int
    opened: threading.Event
    reached: threading.Event

    @classmethod
    def before(cls, at: int) -> Gate:
        return cls(at, threading.Event(), threading.Event())


class Gated(EchoEngine):
    """Echoes; waits at its gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for number, completion in enumerate(super().generate(plan, sequences, control)):
            if number == self._gate.at:
                self._gate.reached.set()
                assert self._gate.opened.wait(20)
            yield completion


def test_an_idle_worker_takes_what_another_has_not_begun(fleet_of: Callable[..., Fleet]) -> None:
    """One of two is stuck in a row: the other one does its second piece too, and only then is it
    opened. Seen red: without shares the two waited for each other."""
    plan = plan_of([[4 + i % 90, 5 + i // 90] for i in range(88)], (SamplingParams(4),))
    gate = Gate.before(1)
    stuck_first = iter([gate])

    def engine(worker: int) -> EchoEngine:
        return Gated(next(stuck_first, Gate.before(-1)))

    fleet = fleet_of(2, engine)
    found = []
    sequences = np.arange(len(plan.sequences))
    for completion in fleet.generate(plan, sequences, RunControl()):
        found.append(completion)
        if len(found) >= len(sequences) - 22:  # no piece has more than a quarter of the rows
            gate.opened.set()
    assert answers(found) == answers(run(EchoEngine(), plan))
    assert not fleet.counters.lost_workers


def test_the_last_row_is_not_passed_to_and_fro(fleet_of: Callable[..., Fleet]) -> None:
    """Seen red: a worker that had not yet begun its only piece gave it to the one without work,
    30,000 times in eight seconds on a busy machine."""
    plan = plan_of([[4], [5]], (SamplingParams(4),))
    fleet = fleet_of(4, lambda worker: EchoEngine())
    crew = fleet.crew
    assert isinstance(crew, ThreadCrew)
    for _ in range(50):
        crew.sent.clear()
        assert len(run(fleet, plan)) == 2
        assert sum(len(order.assignments) for _, order in crew.sent) <= 3


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_told_after_the_last_answer_is_not_of_the_next_call(
    fleet_of: Callable[..., Fleet], size: int
) -> None:
    """Seen red: a piece of the second call was taken to have ended with the first one's."""

    class Lingering(EchoEngine):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            yield from super().generate(plan, sequences, control)
            time.sleep(0.2)

    plan = plan_of([[4], [5], [6], [7]], (SamplingParams(4),))
    fleet = fleet_of(size, lambda worker: Lingering())
    for _ in range(4):
        assert len(run(fleet, plan)) == 4
        assert fleet.counters.generated_tokens <= 4 * 4


def test_a_slow_worker_ends_with_the_fast_one(fleet_of: Callable[..., Fleet]) -> None:
    """One group in two pieces, on devices of which one takes five times as long: it gives back
    while it computes. Seen red: without shares each answers half."""
    plan = plan_of([[9] * 60 + [4 + i] for i in range(80)], (SamplingParams(4),))
    done = [0, 0]
    other_began = threading.Event()

    class Timed(EchoEngine):
        def __init__(self, worker: int) -> None:
            super().__init__()
            self._worker = worker

        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            if self._worker:
                other_began.set()
            assert other_began.wait(10), "the second worker got nothing"
            for completion in super().generate(plan, sequences, control):
                time.sleep(0.05 if self._worker else 0.01)
                done[self._worker] += 1
                yield completion

    fleet = fleet_of(2, Timed)
    found = run(fleet, plan)
    assert answers(found) == answers(run(EchoEngine(), plan)) and not fleet.counters.lost_workers
    assert sum(done) == len(plan.sequences) and done[1] <= 30


@pytest.mark.parametrize("max_rows", [1, 4])
def test_the_engine_forgets_what_is_taken_back(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is computed, and nothing else is lost. Seen red: `forget` that did not tell
    the nodes above left their ranges reserved after the last row."""
    schedulers: list[Scheduler] = []

    def remember(*arguments: Any) -> Scheduler:
        schedulers.append(Scheduler(*arguments))
        return schedulers[-1]

    monkeypatch.setattr(prefix_run, "Scheduler", remember)
    plan, engine = mixed_plan(), tiny_engine(max_rows, kv_tokens=80)
    taken: list[int] = []
    steps = 0

    def wants_back() -> bool:
        nonlocal steps
        steps += 1
        return steps in (3, 9)

    def take_back(waiting: object) -> int:
        assert isinstance(waiting, list)
        if not waiting:
            return 0
        half = waiting[len(waiting) // 2 :]
        taken.extend(half)
        return len(half)

    control = RunControl(wants_back=wants_back, take_back=take_back)
    everything = np.arange(len(plan.sequences))
    kept = answers(list(engine.generate(plan, everything, control)))
    assert taken and set(kept) == set(everything.tolist()) - set(taken)
    expected = answers(run(tiny_engine(), plan))
    assert all(expected[s] == ids for s, ids in kept.items())
    needed = prefill_tokens(plan, np.array(sorted(kept), np.int64))
    assert engine.counters.prefilled_tokens == needed
    assert not schedulers[0]._residency.ranges


class Dying(EchoEngine):
    """Calls `die` when it meets a sequence whose prompt begins with the poison."""

    def __init__(self, poison: int, die: Callable[[], None]) -> None:
        super().__init__()
        self._poison, self._die = poison, die

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for completion in super().generate(plan, sequences, control):
            if int(plan.prompt_token_ids(completion.sequence)[0]) == self._poison:
                self._die()
            yield completion


def test_a_worker_that_is_lost_costs_nothing_but_time(fleet_of: Callable[..., Fleet]) -> None:
    plan = mixed_plan(90)
    fleet = fleet_of(2)
    crew = fleet.crew
    assert isinstance(crew, ThreadCrew)
    found = []
    for completion in fleet.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        found.append(completion)
        if len(found) in (5, 20, 21):
            crew.lose(len(found) % 2)
    assert answers(found) == answers(run(tiny_engine(), plan))
    assert 1 <= fleet.counters.lost_workers <= 3
    assert len(crew.hired) >= 2 + fleet.counters.lost_workers


def test_a_row_that_no_worker_survives_becomes_an_error(fleet_of: Callable[..., Fleet]) -> None:
    """By an exception of the engine, whose message stays where it was raised."""
    plan = plan_of([[4 + i // 50, 5 + i % 50, 6] for i in range(100)], (SamplingParams(4),))
    sequences = np.arange(len(plan.sequences))
    poison = [int(plan.prompt_token_ids(s)[0]) for s in range(len(sequences))].index(5)

    class Picky(EchoEngine):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            for completion in super().generate(plan, sequences, control):
                if plan.prompt_token_ids(completion.sequence).tolist() == bad:
                    raise ValueError("canary 7461 sings")
                yield completion

    bad = plan.prompt_token_ids(poison).tolist()
    fleet = fleet_of(2, lambda worker: Picky())
    found = run(fleet, plan)
    assert sorted(answers(found)) == sequences.tolist()
    failed = [c for c in found if c.finish_reason == "error"]
    assert [(c.sequence, c.error_type) for c in failed] == [(poison, "WorkerLost")]
    assert "canary" not in str(failed[0])


def test_what_fails_everywhere_ends_the_job(fleet_of: Callable[..., Fleet]) -> None:
    """Every engine dies of every row: no endless round of replacements."""

    class Broken(EchoEngine):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            raise EngineError("this machine's memory is not sound")
            yield

    fleet = fleet_of(2, lambda worker: Broken())
    with pytest.raises(EngineError, match="without an answer in between.*not sound.*same command"):
        run(fleet, mixed_plan())


def test_what_keeps_the_first_engine_from_loading_is_the_jobs_error() -> None:
    def absent(worker: int) -> Engine:
        raise ModelError("the model is not there; bring it")

    with pytest.raises(ModelError, match="bring it"):
        Fleet(ThreadCrew(2, absent))


def test_one_machine_without_the_model_is_done_without(
    fleet_of: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried three times and left alone; the message says why."""
    gate, tries = Gate.before(1), []

    def make(worker: int) -> Engine:
        if worker == 0:
            return Gated(gate)
        assert gate.reached.wait(20)  # by then the fleet has a worker that is fit
        tries.append(worker)
        if len(tries) == 3:
            gate.opened.set()
        raise ModelError("not the model of the driver")

    plan, fleet = mixed_plan(), fleet_of(2, make)
    assert len(answers(run(fleet, plan))) == len(plan.sequences)
    assert isinstance(fleet.crew, ThreadCrew) and fleet.crew.hired.count(1) == 3
    assert "not the model of the driver" in caplog.text


def test_nobody_left_and_nobody_coming_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(staff, "_TICK_S", 0.1)
    never = threading.Event()

    def stuck(worker: int) -> Engine:
        never.wait(3)
        return EchoEngine()

    with pytest.raises(EngineError, match="no worker has come up.*room for one"):
        Fleet(ThreadCrew(1, stuck))
    never.set()


def test_a_drain_finishes_what_has_begun_and_nothing_else(fleet_of: Callable[..., Fleet]) -> None:
    plan, fleet = mixed_plan(120), fleet_of(2)
    draining = threading.Event()
    control = RunControl(should_drain=draining.is_set)
    found = []
    for completion in fleet.generate(plan, np.arange(len(plan.sequences)), control):
        found.append(completion)
        draining.set()
    expected = answers(run(tiny_engine(), plan))
    assert 0 < len(found) < len(expected)
    assert all(expected[s] == ids for s, ids in answers(found).items())


def test_an_abort_returns_at_once(fleet_of: Callable[..., Fleet]) -> None:
    gate = Gate.before(2)
    fleet = fleet_of(2, lambda worker: Gated(gate))
    aborting = threading.Event()
    control = RunControl(should_abort=aborting.is_set)
    threading.Timer(0.5, aborting.set).start()
    begin = time.monotonic()
    plan = mixed_plan()
    assert len(list(fleet.generate(plan, np.arange(len(plan.sequences)), control))) <= 4
    assert time.monotonic() - begin < 5
    gate.opened.set()


@pytest.mark.parametrize("size", [1, 3])
def test_samples_of_a_row_may_be_with_several_workers(
    fleet_of: Callable[..., Fleet], size: int
) -> None:
    """Few long prompts with many samples: answers and log-probabilities as of one engine, and what
    was computed again is known."""
    asked = SamplingParams(max_new_tokens=5, temperature=1.0, n=24, logprobs=2, ignore_eos=True)
    plan = plan_of([list(range(4, 70)), list(range(4, 60)) + [90]], (asked,))
    fleet, alone = fleet_of(size), tiny_engine()
    found = {c.sequence: c for c in run(fleet, plan)}
    expected = {c.sequence: c for c in run(alone, plan)}
    assert found.keys() == expected.keys() and len(found) == 48
    for sequence, completion in expected.items():
        assert found[sequence].token_ids == completion.token_ids
        assert len(found[sequence].logprobs) == 5
    counted = fleet.counters
    assert counted.prefilled_tokens == plan.tree.unique_tokens + counted.replicated_tokens
    total = int(plan.prompt_lengths.sum())
    cached = sum(completion.cached_tokens for completion in found.values())
    assert total - cached == counted.prefilled_tokens
