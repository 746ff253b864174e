"""What it costs a conversation to give way, and that both ways of coming back are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine import evictions, spill_cost
from pipeline.engine.device_costs import DeviceCosts
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.spill_cost import SpillCost, measure
from pipeline.plan.conversation_figures import NEVER_SAVED, gives_way
from pipeline.plan.conversations import Eviction
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_documents import engine_of
from tests.engine.test_turns import check_gap, evicting, plan_of, random_conversations, run

BYTES = 10  # of a token


def by_depth(tokens: int) -> SpillCost:
    """As if saving took as long as computing so many tokens, whatever is saved."""
    return SpillCost(forward_s=0.0, token_s=1.0, pair_s=0.0, copy_s=tokens, byte_s=0.0)


@pytest.mark.parametrize(
    ("cost", "depth"),
    [
        (by_depth(20), 20),
        (SpillCost(0.0, 1.0, 0.0, 20.0, 0.05), 40),  # a token costs half a second less
        (SpillCost(5.0, 1.0, 0.0, 0.0, 0.0), 1),
        (SpillCost(0.0, 0.0, 2.0, 50.0, 0.0), 8),  # 7 x 7 < 50 < 8 x 8
        (SpillCost(0.0, 1.0, 2.0, 0.0, 0.5), 4),  # n * n >= 4 n
        (SpillCost(0.0, 1.0, 0.0, 0.0, 0.2), NEVER_SAVED),
        (SpillCost(3.0, 0.0, 0.0, 2.0, 0.0), 1),
        (SpillCost(9.0, 1.0, 2.0, 0.0, 0.2), 1),
    ],
)
def test_saving_pays_from_the_break_even(cost: SpillCost, depth: int) -> None:
    assert cost.break_even_tokens(BYTES) == depth
    if depth < NEVER_SAVED:
        assert cost.compute_s(depth) >= cost.save_s(depth * BYTES)
    if 1 < depth < NEVER_SAVED:
        assert cost.compute_s(depth - 1) < cost.save_s((depth - 1) * BYTES)


def test_what_becomes_of_a_conversation_that_gives_way_is_said_in_words() -> None:
    assert "from 1,200 tokens on, and computed again below" in gives_way(1200)
    assert gives_way(1).startswith("saved") and gives_way(NEVER_SAVED).startswith("computed again")


@pytest.mark.parametrize("context", [256, 20, None])
def test_measured_costs_are_those_of_a_machine(context: int | None) -> None:
    loaded = tiny.load_tiny()
    shape = replace(loaded.shape, context_length=context)
    engine = PrefixEngine(replace(loaded, shape=shape), EngineSettings())
    found = measure(engine.loaded, engine.backend)
    assert found.token_s + found.forward_s > 0 and found.copy_s + found.byte_s > 0
    assert found.break_even_tokens(BYTES) >= 1


def test_costs_are_measured_once_and_survive_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = PrefixEngine(tiny.load_tiny(), EngineSettings()), list[object]()
    monkeypatch.setattr(spill_cost, "measure", lambda *asked: calls.append(asked) or by_depth(7))
    for damage in (None, None, "{", '{"token_s": -1}'):
        if damage is not None:
            (kept,) = tmp_path.iterdir()
            kept.write_text(damage)
        found = spill_cost.spill_cost(engine.loaded, engine.backend, tmp_path)
        assert found == by_depth(7)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("evictor", "between"),
    [("none", 120), ("sink-recent", 220), pytest.param("h2o", 220, marks=pytest.mark.slow)],
)
def test_the_depth_decides_who_is_saved_and_no_answer_changes(evictor: str, between: int) -> None:
    """Between the depths of those that give way some are saved and others are computed again."""
    conversations = random_conversations(random.Random(4), count=8, turns=9)
    eviction = Eviction() if evictor == "none" else evicting(evictor, budget=70)
    plan = plan_of(conversations, eviction, new=40 if evictor == "none" else 60)
    plenty = run(engine_of(), plan)
    slots = 460 if evictor == "none" else 150
    plain = engine_of()
    assert plain.capabilities.kv is not None
    budget = EngineSettings(kv_budget=slots * plain.capabilities.kv.bytes_per_token)
    costs = DeviceCosts(spill=by_depth(between))
    engine = PrefixEngine(plain.loaded, budget, plain.backend, costs)
    assert engine.capabilities.saves_from == between
    assert any("gives way" in note for note in engine.notes)
    found = run(engine, plan)
    assert {s: [t.token_ids for t in turns] for s, turns in found.items()} == {
        s: [t.token_ids for t in turns] for s, turns in plenty.items()
    }
    assert engine.counters.saved_conversations and engine.counters.repeated_conversations


def test_a_history_that_gives_nothing_up_is_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red, where a first prompt is shared: its positions were to become small again, of which
    nothing but an evicting engine knows how."""
    monkeypatch.setattr(evictions, "REBASE_AT", 20)
    told = random_conversations(random.Random(1), turns=6)
    shared = [[[*range(5, 25), *first], *later] for first, *later in told]
    check_gap(engine_of(), plan_of(shared, system=20))
