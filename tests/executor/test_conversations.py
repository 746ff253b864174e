"""Conversations on many workers: each with one of them whole, and going on where one is lost."""

from __future__ import annotations

import pickle
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, RunControl
from pipeline.engine.resent import Turn
from pipeline.executor.base import Event, Report
from pipeline.executor.fleet import Fleet
from pipeline.plan.plan import Plan
from pipeline.plan.shards import cut_into_shards
from pipeline.plan.subplan import carve, only, prefill_tokens
from pipeline.records import Completion, EarlierTurn
from tests.conversation_plan import plan_of, random_talks
from tests.executor.thread_crew import ThreadCrew, fleets
from tests.job.carrying_engine import CarryingEngine

Told = dict[tuple[int, int], tuple[Any, ...]]


def some_plan(count: int = 60) -> Plan:
    return plan_of(random_talks(random.Random(5), count))


def told(completions: list[Completion]) -> Told:
    """By sequence and turn; each may come once, and in order."""
    found: Told = {}
    for c in completions:
        assert (c.sequence, c.turn) not in found, "a turn was answered twice"
        assert not c.turn or (c.sequence, c.turn - 1) in found, "a turn came before its history"
        found[c.sequence, c.turn] = (c.token_ids, c.prompt_tokens, c.error_type, c.state)
    return found


def run(engine: Engine, plan: Plan, hooks: EngineHooks = NO_HOOKS) -> list[Completion]:
    sequences = np.arange(len(plan.sequences))
    return list(engine.generate(plan, sequences, RunControl(), hooks))


@pytest.fixture
def fleet_of() -> Iterator[Callable[..., Fleet]]:
    yield from fleets(lambda worker: CarryingEngine())


@pytest.mark.parametrize("chosen", [slice(None), slice(10, 40), slice(3, None, 7)])
def test_a_carved_plan_has_the_turns_of_its_conversations(chosen: slice) -> None:
    plan = only(some_plan(), np.arange(60)[2:])
    sequences = np.arange(len(plan.sequences))[chosen]
    part = pickle.loads(pickle.dumps(carve(plan, sequences)))
    assert len(part.table) == len(part.sequence_of_row) == len(part.reuse_depth)
    assert part.tokens_to_compute(np.arange(len(sequences))) == prefill_tokens(plan, sequences)
    for place, sequence in enumerate(sequences.tolist()):
        assert part.num_turns(place) == plan.num_turns(sequence)
        for turn in range(plan.num_turns(sequence)):
            ours, theirs = part.row_of(place, turn), plan.row_of(sequence, turn)
            assert part.table[ours].tolist() == plan.table[theirs].tolist()
            assert part.params_of(place, turn) == plan.params_of(sequence, turn)
            assert part.noise_key_of(place, turn) == plan.noise_key_of(sequence, turn)
            assert not turn or int(part.sequence_of_row[ours]) == place


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_fleet_answers_turns_as_one_engine_and_counts_every_token(
    fleet_of: Callable[..., Fleet], size: int
) -> None:
    plan, fleet, alone = some_plan(), fleet_of(size), CarryingEngine()
    assert told(run(fleet, plan)) == told(run(alone, plan))
    counted = fleet.counters
    assert counted.prefilled_tokens == alone.counters.prefilled_tokens + counted.replicated_tokens
    assert counted.generated_tokens == alone.counters.generated_tokens
    assert not counted.lost_workers


def test_tokens_computed_twice_are_counted_though_the_last_worker_has_not_said_it_is_through(
    fleet_of: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: the last answers came home before their piece was told to have ended, and what it
    needed was left out."""
    plan, fleet, alone = some_plan(), fleet_of(2), CarryingEngine()
    receive, late = fleet.crew.receive, defaultdict[int, tuple[int, ...]](tuple)

    def late_endings(timeout_s: float) -> Iterator[tuple[int, Event]]:
        for worker, event in receive(timeout_s):
            if isinstance(event, Report):
                now, late[worker] = late[worker], event.ended
                event = replace(event, ended=now)
            yield worker, event

    monkeypatch.setattr(fleet.crew, "receive", late_endings)
    assert told(run(fleet, plan)) == told(run(alone, plan))
    counted = fleet.counters
    assert counted.replicated_tokens > 0
    assert counted.prefilled_tokens == alone.counters.prefilled_tokens + counted.replicated_tokens


def test_what_a_shard_costs_counts_all_turns() -> None:
    """Seen red: a conversation of a hundred turns weighed as much as its first prompt."""
    plan = plan_of([[[5 + i]] + [[9, 9, 9]] * (100 if i == 3 else 1) for i in range(9)])
    shards = cut_into_shards(plan, 2)
    assert sorted(len(shard.sequences) for shard in shards) == [1, 8]


def test_a_conversation_goes_on_after_the_turns_of_a_lost_worker(
    fleet_of: Callable[..., Fleet],
) -> None:
    plan = some_plan(90)
    fleet = fleet_of(2, lambda worker: CarryingEngine(lambda number: time.sleep(0.005)))
    crew = fleet.crew
    assert isinstance(crew, ThreadCrew)
    found = []
    for completion in fleet.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        found.append(completion)
        if len(found) in (5, 20, 21):
            crew.lose(len(found) % 2)
    assert told(found) == told(run(CarryingEngine(), plan))
    assert 1 <= fleet.counters.lost_workers <= 3
    given = [a.earlier for _, order in crew.sent for a in order.assignments]
    assert any(given), "nobody had to go on in the middle, so this shows nothing"


def test_earlier_turns_of_another_session_travel(fleet_of: Callable[..., Fleet]) -> None:
    plan = some_plan()
    whole = run(CarryingEngine(), plan)
    before: dict[int, list[EarlierTurn]] = {}
    for c in whole:
        if c.sequence % 2 and c.turn < min(2, plan.num_turns(c.sequence) - 1):
            assert c.state is not None
            before.setdefault(c.sequence, []).append(EarlierTurn(c.token_ids, c.state.eviction_log))
    hooks = EngineHooks(earlier_turns=lambda sequence: before.get(sequence, ()))
    rest = {(c.sequence, c.turn): c.token_ids for c in run(fleet_of(2), plan, hooks)}
    assert rest == {
        (c.sequence, c.turn): c.token_ids
        for c in whole if c.turn >= len(before.get(c.sequence, ()))
    }  # fmt: skip


def failing_at(turns: Mapping[int, int], plan: Plan) -> Callable[[Turn], bool]:
    """By first prompts, as workers number sequences anew."""
    prompts = {tuple(plan.prompt_token_ids(s).tolist()): turn for s, turn in turns.items()}

    def fails(turn: Turn) -> bool:
        return any(
            tuple(turn.prompt[: len(prompt)]) == prompt and turn.number == number
            for prompt, number in prompts.items()
        )

    return fails


def test_a_turn_that_no_worker_survives_ends_its_conversation_and_no_other(
    fleet_of: Callable[..., Fleet],
) -> None:
    plan = plan_of([[[2 + i // 20, 2 + i % 20]] + [[3], [4], [5]] for i in range(60)])
    deadly = failing_at({30: 2}, plan)

    def die(turn: Turn) -> bool:
        if deadly(turn):
            raise ValueError("canary 7461 sings")
        return False

    found = told(run(fleet_of(2, lambda worker: CarryingEngine(fails=die)), plan))
    whole = told(run(CarryingEngine(), plan))
    errors = {key: error for key, (_, _, error, _) in found.items() if error}
    assert errors == {(30, 2): "WorkerLost", (30, 3): "PriorTurnFailed"}
    assert {k: v for k, v in found.items() if k not in errors} == {
        k: v for k, v in whole.items() if k not in errors
    }


@pytest.mark.parametrize(("sequence", "turn"), [(4, 1), (33, 2)])
def test_turns_after_a_failed_one_fail_also_where_its_worker_is_lost_at_once(
    fleet_of: Callable[..., Fleet], sequence: int, turn: int
) -> None:
    """Seen red: another worker went on after it, as if it had answered nothing. (One failure a
    run: the last sequence of a piece on which two workers have died is given up.)"""
    plan = plan_of([[[2 + i // 20, 2 + i % 20]] + [[3], [4], [5]] for i in range(40)])
    fails = failing_at({sequence: turn}, plan)
    fleet = fleet_of(2, lambda worker: CarryingEngine(fails=fails))
    crew = fleet.crew
    assert isinstance(crew, ThreadCrew)
    found = []
    for completion in fleet.generate(plan, np.arange(40), RunControl()):
        found.append(completion)
        if completion.error_type == "OutOfMemory":
            for worker in range(2):
                crew.lose(worker)
    errors = {key: error for key, (_, _, error, _) in told(found).items() if error}
    later = {(sequence, number): "PriorTurnFailed" for number in range(turn + 1, 4)}
    assert errors == {(sequence, turn): "OutOfMemory"} | later
    assert len(found) == 160
