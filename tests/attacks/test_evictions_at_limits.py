"""Conversations at the limits of their budget, of the device and of positions.

Compared with the slow reference. Each once ended a job, or told of other tokens than were kept.
"""

from __future__ import annotations

import random
from itertools import product

import pytest

from pipeline.engine import evictions, kept_kv
from pipeline.plan.conversations import Evictor
from tests.engine.test_documents import engine_of
from tests.engine.test_evicting import EVICTORS, POSITIONS, apart, check
from tests.engine.test_turns import (
    NEW_TOKENS,
    SYSTEM,
    Conversation,
    evicting,
    plan_of,
    random_conversations,
    run,
)
from tests.sweeps import diagonal, sweep

BYTES_A_TOKEN = 2 * 2 * 2 * 16 * 4  # of the tiny model


def alike(seed: int, count: int = 6, turns: int = 7) -> list[Conversation]:
    """The first prompt of the next is that of the one before, or begins with it."""
    conversations = random_conversations(random.Random(seed), count, turns)
    return [
        [[*conversations[0][0], *range(4, 4 + i // 2)], *turns[1:]]
        for i, turns in enumerate(conversations)
    ]


@pytest.mark.parametrize(
    ("evictor", "positions"), diagonal(("sink-recent", "random", "h2o", "snapkv"), POSITIONS)
)
def test_positions_that_became_small_again_change_nothing(
    evictor: Evictor, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not which token is which, and not where shared keys stand that are gathered later."""
    monkeypatch.setattr(evictions, "REBASE_AT", 18)
    for budget in (36, 52):
        eviction = evicting(evictor, positions, budget=budget, window=120)
        check(engine_of(), plan_of(alike(5, turns=9), eviction))


UNITS, SYSTEMS = ("token", "turn"), (0, SYSTEM)
SOME = [
    ("sink-recent", "token", 0), ("oldest", "turn", SYSTEM), ("h2o", "token", SYSTEM),
    ("random", "turn", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("evictor", "unit", "system"), sweep(product(EVICTORS, UNITS, SYSTEMS), SOME)
)
def test_a_question_that_fills_the_budget_is_answered(
    evictor: Evictor, unit: str, system: int
) -> None:
    """Nothing else stays beside it, no history, not even slots for its whole answer."""
    draw = random.Random(9)
    question, new = 23 - system, 20
    turns = [[draw.randrange(4, 97) for _ in range(n)] for n in (8, question - 1, 3, question - 1)]
    eviction = evicting(evictor, "auto", budget=24, window=24, unit=unit)
    kv_budget = 2 * 24 * BYTES_A_TOKEN
    for conversations in ([turns], [turns, turns[:3]]):
        plan = plan_of(conversations, eviction, new, system)
        check(engine_of(kv_budget=kv_budget), plan, new, system=system)


FULL = [("random", 0, 0), ("h2o", 0, None), ("h2o", 8, 0), ("snapkv", 20, None)]


@pytest.mark.parametrize(
    ("evictor", "spare", "spill"),
    sweep(product(("random", "h2o", "snapkv"), (0, 8, 20), (None, 0)), FULL),
)
def test_what_is_gathered_finds_room_on_a_full_device(
    evictor: Evictor, spare: int, spill: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a conversation keeps of a shared prompt becomes its own: others, or it, give way; what
    does is saved, or with a `spill` of 0 computed again."""
    monkeypatch.setattr(kept_kv, "MOST_RUNS", 1)
    conversations = alike(11, count=8)
    eviction = evicting(evictor, "auto", budget=34, window=40)
    longest = max(len(turns[0]) for turns in conversations)
    kv_budget = (34 + longest + 1 + spare) * BYTES_A_TOKEN
    check(engine_of(kv_budget=kv_budget, spill_memory=spill), plan_of(conversations, eviction))


def test_a_first_prompt_that_is_wholly_shared_was_there() -> None:
    """`prefill_peak` of the first turn is its prompt, whoever computed it."""
    first = apart(3, 2)[0][0]
    conversations: list[Conversation] = [[first], [first], [[*first, 5]]]
    for turns in run(engine_of(), plan_of(conversations, new=NEW_TOKENS)).values():
        assert turns[0].state is not None
        assert turns[0].state.prefill_peak == turns[0].prompt_tokens
