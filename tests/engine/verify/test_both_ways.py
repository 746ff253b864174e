"""What both ways of a plan would say, against letting each write and forcing each by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify import both_ways
from pipeline.engine.verify.both_ways import BothWays, Difference
from pipeline.errors import EngineError
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan
from pipeline.records import SamplingParams
from tests.engine import tiny
from tests.engine.test_documents import engine_of, plan_rows, random_rows

CONCAT = Reuse("concat", tiny.VOCABULARY)
RULES = json.dumps({"repetition_penalty": 1.9})


@pytest.fixture(scope="module")
def engine() -> PrefixEngine:
    return engine_of()


def plan_of(reuse: Reuse = CONCAT, **params: object) -> Plan:
    plan = plan_rows(random_rows(random.Random(3), 10), reuse)
    longest = SamplingParams(max_new_tokens=12)
    return replace(plan, params=(replace(longest, **params), longest))  # type: ignore[arg-type]


def ways_of(engine: PrefixEngine, plan: Plan, control: RunControl) -> BothWays:
    return BothWays(engine, plan, replace(plan, documents=None), control)


def compare(engine: PrefixEngine, plan: Plan) -> dict[int, Difference]:
    found = ways_of(engine, plan, RunControl()).compare(np.arange(len(plan.sequences)))
    assert found is not None
    return found


def written(
    engine: PrefixEngine, plan: Plan, hooks: EngineHooks | None = None
) -> dict[int, tuple[int, ...]]:
    every = np.arange(len(plan.sequences))
    done = engine.generate(plan, every, RunControl(), hooks or EngineHooks())
    return {completion.sequence: completion.token_ids for completion in done}


@pytest.mark.parametrize("rules", ["", RULES], ids=["plain", "rules"])
def test_the_same_answer_is_one_that_both_ways_write_alone(
    engine: PrefixEngine, rules: str
) -> None:
    plan = plan_of(rules=rules)
    full, moved = written(engine, replace(plan, documents=None)), written(engine, plan)
    found = compare(engine, plan)
    assert {s: full[s] == moved[s] for s in full} == {s: d.is_same for s, d in found.items()}
    assert len({d.is_same for d in found.values()}) == 2, "all rows are alike: nothing is shown"


def test_divergences_are_those_of_the_logits_given_the_answer_in_full(engine: PrefixEngine) -> None:
    plan = plan_of()
    hooks, expected = tiny.watch_logits()
    full = written(engine, replace(plan, documents=None), hooks)
    hooks, seen = tiny.watch_logits()
    written(
        engine,
        plan,
        replace(hooks, force_tokens=lambda rows, at: [full[s][i] for s, i in zip(rows, at)]),  # noqa: B905
    )
    for sequence, difference in compare(engine, plan).items():
        places = [(sequence, i) for i in range(len(full[sequence]))]
        p, q = (torch.stack([x[at] for at in places]).double() for x in (expected, seen))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        assert difference.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert difference.same_choice.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_sampled_rows_are_compared_greedily_and_not_beyond_64_tokens(engine: PrefixEngine) -> None:
    """Seen through what the sampled rows would have: other answers each time."""
    plan = plan_of(temperature=5.0, seed=9)
    found, greedy = compare(engine, plan), compare(engine, plan_of())
    for sequence, difference in found.items():
        assert np.array_equal(difference.same_choice, greedy[sequence].same_choice)
    long = compare(engine, plan_of(max_new_tokens=90, ignore_eos=True))
    assert {len(d.same_choice) for d in long.values()} == {both_ways.MOST_TOKENS}


def test_logits_in_full_take_no_more_than_their_room(
    engine: PrefixEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(ignore_eos=True)
    every = compare(engine, plan)
    rows = len(plan.sequences)
    monkeypatch.setattr(both_ways, "_MOST_LOGIT_BYTES", rows * 12 * tiny.VOCABULARY * 4 // 3)
    some = compare(engine, plan)
    for sequence, difference in some.items():
        assert np.array_equal(difference.same_choice, every[sequence].same_choice)
        assert np.array_equal(difference.kl, every[sequence].kl[::3])


def test_one_document_below_its_preamble_differs_by_rounding(engine: PrefixEngine) -> None:
    draw = random.Random(5)
    rows = [[[5, 6, 7], [draw.randrange(4, 97) for _ in range(12)], [9, i + 4]] for i in range(6)]
    found = compare(engine, plan_rows(rows, CONCAT))
    assert all(d.is_same and d.same_choice.all() and d.kl.max() < 1e-6 for d in found.values())
    assert len(found) == 6


@pytest.mark.parametrize("calls", [0, 6, 20])
def test_what_is_stopped_says_nothing(engine: PrefixEngine, calls: int) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > calls

    plan = plan_of()
    ways = ways_of(engine, plan, RunControl(should_abort=stop))
    assert ways.compare(np.arange(len(plan.sequences))) is None


def test_what_it_took_is_counted(engine: PrefixEngine) -> None:
    plan = plan_of()
    ways = ways_of(engine, plan, RunControl())
    found = ways.compare(np.arange(len(plan.sequences)))
    assert found is not None and plan.documents is not None
    every = np.arange(len(plan.sequences))
    encoded = plan.documents.tokens_to_compute(every)
    assert ways.cost.prefilled_tokens == encoded + plan.tree.unique_tokens
    assert ways.cost.generated_tokens == 2 * sum(len(d.same_choice) for d in found.values())
    assert ways.cost.seconds > 0


def test_an_engine_that_moves_no_document_is_refused() -> None:
    plan = plan_of()
    with pytest.raises(EngineError, match="--reuse prefix"):
        BothWays(EchoEngine(), plan, replace(plan, documents=None), RunControl())
