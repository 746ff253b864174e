"""Log-probabilities of continuations by the engine, against a full forward of each request."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.base import RunControl
from pipeline.engine.forward import PiecewiseForward
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.scorer import Scorer
from pipeline.model.model import use_own_attention
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.scores import plan_scores
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams, Scored
from pipeline.settings import EngineSettings
from tests.engine import families, tiny
from tests.engine.families import FAMILIES, Family
from tests.engine.test_documents import engine_of
from tests.sweeps import sweep

Request = tuple[list[int], list[int]]
"""A context and a continuation."""


def random_requests(draw: random.Random, rows: int = 12) -> list[Request]:
    """Contexts that begin alike, are the same, or go on as another one's continuation does;
    continuations that begin alike, or are the same."""

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, tiny.VOCABULARY) for _ in range(length)]

    shots, labels = ids(20), [ids(1) for _ in range(3)]
    texts = [ids(3), ids(5), ids(4)]
    texts += [texts[0] + ids(2), texts[1][:2] + ids(1), texts[1][:1]]
    found: list[Request] = []
    for _ in range(rows):
        context = draw.choice([shots, []]) + ids(draw.randrange(1, 9))
        found += [(context, choice) for choice in draw.choice([labels, texts])]
    context, continuation = found[-1]
    found += [(context + continuation, ids(2)), (context, continuation), (ids(1), ids(3))]
    return found


def plan_of(requests: list[Request]) -> Plan:
    table = TokenTable.from_lists([context + ids[:-1] for context, ids in requests])
    params = (SamplingParams(max_new_tokens=1),)
    names = [str(i) for i in range(len(requests))]
    plan = build_plan(table, names, params, np.zeros(len(requests), np.int64))
    flat = np.array([i for _, ids in requests for i in ids], np.uint32)
    lengths = np.array([len(ids) for _, ids in requests])
    contexts = np.array([len(context) for context, _ in requests])
    scores = plan_scores(
        plan.tree, plan.sequences.prompt, plan.sequence_of_row, contexts, (flat, lengths)
    )
    return Plan(**{**vars(plan), "scores": scores})


def run(engine: PrefixEngine, plan: Plan) -> dict[int, Scored]:
    """By request."""
    assert plan.scores is not None
    found: dict[int, Scored] = {}
    every = np.arange(len(plan.sequences))
    for done in engine.generate(plan, every, RunControl()):
        assert done.error_type is None, done
        low, high = plan.scores.bounds[done.sequence : done.sequence + 2].tolist()
        found |= zip(plan.scores.request[low:high].tolist(), done.scores, strict=True)
    return found


def expected(engine: PrefixEngine, request: Request) -> tuple[torch.Tensor, bool]:
    context, ids = request
    model = engine.loaded.model
    use_own_attention(model)
    with torch.inference_mode():
        logits = model(torch.tensor([context + ids[:-1]]), use_cache=False).logits[0].float()
    logits = logits[len(context) - 1 :]
    logprobs = torch.log_softmax(logits, -1)[range(len(ids)), ids]
    return logprobs, logits.argmax(-1).tolist() == ids


def check(engine: PrefixEngine, requests: list[Request], bound: float = 1e-4) -> None:
    plan = plan_of(requests)
    found = run(engine, plan)
    assert plan.scores is not None
    points = {tuple(context + ids[:k]) for context, ids in requests for k in range(len(ids))}
    assert plan.scores.num_points == len(points)
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens
    for number, request in enumerate(requests):
        logprobs, is_greedy = expected(engine, request)
        got = torch.tensor(found[number].logprobs)
        assert (got - logprobs).abs().max() <= bound, number
        assert found[number].is_greedy == is_greedy


@pytest.mark.parametrize("seed", sweep(range(4), (0, 1)))
def test_scores_are_those_of_a_full_forward(seed: int) -> None:
    check(engine_of(), random_requests(random.Random(seed)))


@pytest.mark.parametrize("tokens", [16, 23])
def test_they_are_the_same_in_pieces(tokens: int) -> None:
    check(engine_of(max_batch_tokens=tokens), random_requests(random.Random(5)))


def test_they_are_the_same_where_spans_give_way() -> None:
    kv = engine_of().capabilities.kv
    assert kv is not None
    engine = engine_of(kv_budget=40 * kv.bytes_per_token, max_rows=3)
    requests = random_requests(random.Random(6))
    plan = plan_of(requests)
    plenty, found = run(engine_of(), plan), run(engine, plan)
    for number in range(len(requests)):
        assert found[number].logprobs == pytest.approx(plenty[number].logprobs, abs=1e-4)


@pytest.mark.parametrize("is_native", [False, True])
def test_few_rows_of_logits_are_there_at_once(
    monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    monkeypatch.setattr("pipeline.engine.scorer.MOST_ROWS", 3)
    monkeypatch.setattr("pipeline.engine.scorer.ROWS_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.engine.forwards.ROWS_AT_ONCE", 2)
    engine, most = engine_of(), list[int]()
    if is_native:
        llama = next(family for family in FAMILIES if family.id == "llama, grouped heads")
        engine = PrefixEngine(families.load(llama, torch.float32), EngineSettings())
        if not isinstance(engine.backend.forward, PiecewiseForward):
            pytest.skip("the compiled kernels are not there")
    note = Scorer.note

    def noted(self: Scorer, points: Any, logits: torch.Tensor) -> None:
        most.append(len(logits))
        note(self, points, logits)

    monkeypatch.setattr(Scorer, "note", noted)
    check(engine, random_requests(random.Random(7)), 1e-3)
    assert max(most) <= 3


@pytest.mark.parametrize("family", families.some_quick(FAMILIES), ids=lambda family: family.id)
def test_a_family_scores_as_its_own_forward_does(family: Family) -> None:
    engine = PrefixEngine(families.load(family, torch.float32), EngineSettings())
    check(engine, random_requests(random.Random(8), 4), 1e-3)
