"""Conversations that give up tokens, by the engine, against the slow reference of each alone."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.slow_turns import GivenTurn, SlowTurns
from pipeline.engine.verify.stateful_reference import SlowConversation
from pipeline.plan.conversations import Evictor
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn
from pipeline.settings import EngineSettings
from tests.engine import families, tiny
from tests.engine.families import FAMILIES, Family
from tests.engine.test_documents import engine_of
from tests.engine.test_turns import (
    NEW_TOKENS,
    SYSTEM,
    Conversation,
    evicting,
    plan_of,
    random_conversations,
    run,
    streams,
)
from tests.sweeps import diagonal, sweep

ROTARY = [family for family in FAMILIES if family.model_type not in ("gpt2", "opt")]
QUICK = [family for family in ROTARY if families.is_quick(family)]


EVICTORS: tuple[Evictor, ...] = (
    "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o", "snapkv",
    "random",
)  # fmt: skip
POSITIONS = ("gap", "rerotate", "auto")


def given(plan: Plan, turns: list[Completion], sequence: int, new: int) -> list[GivenTurn]:
    """What the engine was fed and answered."""
    answers = [turn.token_ids for turn in turns]
    done, found = 0, []
    for ids, answer in zip(streams(plan, answers, sequence), answers, strict=True):
        found.append(GivenTurn(np.array(ids[done:]), answer, new))
        done = len(ids) + len(answer) - 1
    return found


def check(
    engine: PrefixEngine,
    plan: Plan,
    new: int = NEW_TOKENS,
    bound: float = 1e-4,
    system: int = SYSTEM,
) -> dict[int, list[Completion]]:
    """Every logit, and every eviction."""
    assert plan.conversations is not None
    eviction = plan.conversations.eviction
    hooks, logits = tiny.watch_logits()
    found = run(engine, plan, hooks)
    for sequence, turns in found.items():
        assert not any(turn.error_type for turn in turns), turns
        slow = SlowConversation(engine.loaded.model, eviction.positions, eviction.window)
        reference = SlowTurns(slow, eviction, system)
        number = 0
        for turn, expected in zip(
            turns, reference.run(given(plan, turns, sequence, new)), strict=True
        ):
            assert turn.state is not None
            assert turn.state.eviction_log == expected.log, (sequence, turn.turn)
            got = torch.stack([logits[sequence, number + i] for i in range(len(turn.token_ids))])
            number += len(got)
            gap = (got - expected.logits).abs().max() / expected.logits.abs().max()
            assert gap <= bound, (sequence, turn.turn, float(gap))
            assert torch.equal(got.argmax(-1), expected.logits.argmax(-1))
            standing = expected.standing[-1]
            assert (turn.state.skew, turn.state.duplicate_positions) == (0, 0)
            assert turn.state.kept_tokens == slow.kept.shape[-1] <= eviction.budget_tokens
            assert turn.state.span >= standing.span and turn.state.runs >= standing.runs
    return found


def apart(seed: int, turns: int = 7) -> list[Conversation]:
    """Without a prefix in common, so that every query is some conversation's own."""
    return [
        random_conversations(random.Random(seed + i), count=1, turns=turns)[0] for i in range(4)
    ]


@pytest.mark.parametrize(("evictor", "positions"), diagonal(EVICTORS, POSITIONS))
def test_an_evictor_computes_what_the_reference_does(evictor: Evictor, positions: str) -> None:
    """Window 40: "auto" closes the gaps of the longer conversations."""
    eviction = evicting(evictor, positions, window=40)
    found = check(engine_of(), plan_of(apart(20, 9), eviction))
    states = [turn.state for turns in found.values() for turn in turns if turn.state]
    assert sum(state.evictions for state in states) > 3


def engine_for(family: Family, dtype: torch.dtype = torch.float32) -> PrefixEngine:
    return PrefixEngine(families.load(family, dtype), EngineSettings())


@pytest.mark.parametrize(
    ("family", "positions"),
    sweep(product(ROTARY, POSITIONS), zip(QUICK, (*POSITIONS, *POSITIONS), strict=True)),
    ids=lambda value: getattr(value, "id", value),
)
def test_a_family_computes_what_the_reference_does(family: Family, positions: str) -> None:
    """By the kernels of this machine; layers with windows take evictors that leave one run."""
    has_windows = bool(family.options.get("sliding_window"))
    evictors = ("oldest", "window") if has_windows else ("sink-recent", "h2o")
    for evictor in evictors:
        eviction = evicting(evictor, positions, window=48)
        check(engine_for(family), plan_of(apart(40, 6)[:2], eviction))


@pytest.mark.parametrize(
    ("evictor", "positions"), diagonal(EVICTORS, (*POSITIONS[1:], POSITIONS[0]))
)
def test_conversations_that_share_a_prompt_compute_what_the_reference_does(
    evictor: Evictor, positions: str
) -> None:
    """Each gives up its own part of what they share, all of the first prompt or its beginning."""
    conversations = random_conversations(random.Random(5), count=4, turns=9)
    conversations += [[*turns[:1], *turns[:0:-1]] for turns in conversations if len(turns) > 2]
    check(engine_of(), plan_of(conversations, evicting(evictor, positions, window=40)))


GIVING_WAY = [
    ("sink-recent", "gap", None), ("sink-recent", "auto", 0), ("h2o", "auto", None),
    ("h2o", "rerotate", 0),
]  # fmt: skip
"""`spill` None: what goes is saved; 0: it is computed again."""


@pytest.mark.parametrize(
    ("evictor", "positions", "spill"),
    sweep(product(("sink-recent", "random", "h2o", "snapkv"), POSITIONS, (None, 0)), GIVING_WAY),
)
def test_conversations_that_give_way_compute_what_the_reference_does(
    evictor: Evictor, positions: str, spill: int | None
) -> None:
    conversations = [turns for seed in (60, 70) for turns in apart(seed, 4)]
    plan = plan_of(conversations, evicting(evictor, positions, window=60), new=20)
    per_token = engine_of().capabilities.kv
    assert per_token is not None
    engine = engine_of(kv_budget=110 * per_token.bytes_per_token, spill_memory=spill)
    check(engine, plan, new=20)
    assert spill is None or engine.counters.recomputed_tokens


KILLED = [
    ("gist-recent", "gap", 2), ("random", "rerotate", 1), ("h2o", "auto", 4), ("snapkv", "gap", 2)
]  # fmt: skip


@pytest.mark.parametrize(
    ("evictor", "positions", "cut"),
    sweep(product(("gist-recent", "random", "h2o", "snapkv"), POSITIONS, (1, 2, 4)), KILLED),
)
def test_a_killed_conversation_goes_on_as_the_reference_says(
    evictor: Evictor, positions: str, cut: int
) -> None:
    """Its first turns come from an earlier session."""
    engine = engine_of()
    plan = plan_of(apart(80, 8), evicting(evictor, positions, window=50))
    whole = run(engine, plan)
    done = {
        s: [EarlierTurn(t.token_ids, t.state.eviction_log) for t in turns[:cut] if t.state]
        for s, turns in whole.items()
    }
    left = [s for s, turns in whole.items() if len(turns) > cut]
    hooks = EngineHooks(earlier_turns=lambda s: done[s])
    for completion in engine.generate(plan, np.array(left), RunControl(), hooks):
        before = whole[completion.sequence][completion.turn]
        assert completion.token_ids == before.token_ids
        assert completion.state is not None and before.state is not None
        assert completion.state.mass_kept == pytest.approx(before.state.mass_kept, abs=1e-4)
        assert replace(completion.state, mass_kept=1.0) == replace(before.state, mass_kept=1.0)


@pytest.mark.parametrize(
    ("family_id", "is_all"), [("mistral, window", True), ("llama, grouped heads", False)]
)
def test_the_mass_that_is_kept_is_that_of_what_a_query_sees(family_id: str, is_all: bool) -> None:
    """With windows of 12 it saw nothing of what goes, 20 tokens and more back."""
    engine = engine_for(next(family for family in ROTARY if family.id == family_id))
    found = run(engine, plan_of(apart(40, 9)[:2], evicting("oldest", budget=50)))
    masses = [
        t.state.mass_kept
        for turns in found.values()
        for t in turns
        if t.state and t.state.evictions
    ]
    assert len(masses) > 1 and all(0 < mass < 1 + 1e-6 for mass in masses)
    assert all((abs(mass - 1) < 1e-6) == is_all for mass in masses)
