"""Rows under a grammar that ask for log-probabilities: forced tokens have theirs, and are fed
together all the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipeline.engine import answering, forced_logprobs
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.records import Completion
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_guides import GREEDY, ids_of, on_a_share, random_plan, run
from tests.sweeps import diagonal

CLOSE = 1e-4


def check_alike(ours: dict[int, Completion], plain: dict[int, Completion]) -> None:
    for sequence, expected in plain.items():
        found = ours[sequence]
        assert (found.token_ids, found.finish_reason) == (
            expected.token_ids,
            expected.finish_reason,
        )
        assert len(found.logprobs) == len(expected.logprobs) == len(found.token_ids)
        for said, truth in zip(found.logprobs, expected.logprobs, strict=True):
            assert said.logprob == pytest.approx(truth.logprob, abs=CLOSE)
            assert said.top_logprobs == pytest.approx(truth.top_logprobs, abs=CLOSE)


@pytest.mark.parametrize(("family", "seed"), diagonal(tiny.FAMILIES, range(3)))
def test_forced_tokens_have_the_logprobs_that_one_by_one_gives(seed: int, family: str) -> None:
    plan, loaded = random_plan(seed, logprobs=2), tiny.load_tiny(family)
    engine = PrefixEngine(loaded, EngineSettings(max_rows=11, max_batch_tokens=64))
    ours = run(engine, plan)
    assert engine.counters.forced_tokens > 0
    assert engine.counters.generated_tokens == sum(len(c.token_ids) for c in ours.values())
    check_alike(ours, run(NaiveEngine(loaded), plan))


def test_rows_with_logprobs_take_as_few_steps_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: 17 steps. The answer ends with a forced token, which has its own as well."""
    chain = [{"8": 1, "9": 1}, *({"20": i + 2} for i in range(16)), {}]
    word = json.dumps({"next": chain, "ends": [17]})
    prompts = [[9, i] for i in range(10, 40)]
    plan = tiny.plan_of(prompts, (replace(GREEDY, constraint=word, logprobs=1),))
    loaded = tiny.load_tiny()
    engine = PrefixEngine(loaded, EngineSettings())
    with_runs, steps = run(engine, plan), engine.counters.num_forwards
    assert {c.forced_tokens for c in with_runs.values()} == {16}
    monkeypatch.setattr(answering, "LEAST_RUN", 10_000)
    without = run(engine, plan)
    assert (steps, engine.counters.num_forwards) == (2, 17)
    check_alike(with_runs, without)


@pytest.mark.parametrize("share", [2, 3, 6])
def test_rows_that_give_up_their_place_read_theirs_when_they_come_back(share: int) -> None:
    done, expected = on_a_share(random_plan(5, max_new_tokens=90, logprobs=1), share)
    check_alike(done, expected)


@pytest.mark.parametrize("most", [1, 7])
def test_so_many_positions_are_read_at_once_and_no_more(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    plan, loaded = random_plan(2, logprobs=1), tiny.load_tiny()
    expected = run(PrefixEngine(loaded, EngineSettings()), plan)
    monkeypatch.setattr(forced_logprobs, "MOST_READ", most)
    read: list[int] = []
    places = forced_logprobs.places

    def watched(found):  # type: ignore[no-untyped-def]
        read.append(len(places(found)))
        return places(found)

    monkeypatch.setattr(forced_logprobs, "places", watched)
    check_alike(run(PrefixEngine(loaded, EngineSettings()), plan), expected)
    assert max(read) == most


def test_logits_that_are_no_numbers_at_a_forced_token_are_the_rows_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = [{"8": 1, "9": 1}, *({"20": i + 2} for i in range(5)), {"8": 7, "9": 7}, {}]
    word = json.dumps({"next": chain, "ends": [7]})
    params = replace(GREEDY, constraint=word, logprobs=0)
    plan = tiny.plan_of([[9, 10], [9, 11]], (params, GREEDY), [0, 1])
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    expected, forward = ids_of(run(engine, plan)), engine.backend.forward

    def broken(batch, cache, keep):  # type: ignore[no-untyped-def]
        logits = forward(batch, cache, keep)
        if batch.input_ids.shape[1] == 6:  # the run: what was chosen and five tokens
            logits[3] = torch.nan
        return logits

    done = run(tiny.with_backend(engine, forward=broken), plan)
    failed, free = done[0], done[1]
    if plan.params_of(0).logprobs is None:
        failed, free = free, failed
    assert (failed.error_type, failed.token_ids) == ("NonFiniteLogits", ())
    assert failed.error_message is not None and "output token 4" in failed.error_message
    assert free.token_ids == expected[free.sequence]
