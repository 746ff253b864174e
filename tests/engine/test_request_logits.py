"""What requests ask of logits, against vLLM's arithmetic written out for one row."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.base import RunControl
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.request_logits import Context, TokenCounts, adjust
from pipeline.engine.sampler import Sampler
from pipeline.engine.sampling import Sampled
from pipeline.generation import resolve_sampling
from pipeline.records import SamplingParams
from pipeline.request_rules import read_asked, with_bad_words
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import run

ASKED: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.2},
    {"presence_penalty": -0.5, "frequency_penalty": 0.7},
    {"presence_penalty": 1.0, "repetition_penalty": 1.6},
    {"logit_bias": {7: 30.0, 9: -100.0}},
    {"logit_bias": {7: 3.0}, "repetition_penalty": 0.7, "frequency_penalty": 2.0},
    {"allowed_token_ids": [5, 6, 7, 60]},
    {"min_tokens": 6},
    {"min_tokens": 4, "stop_token_ids": [7, 60]},
    {"allowed_token_ids": [7, 11, 60], "logit_bias": {7: -5.0}, "presence_penalty": 2.0},
    {"bad_words": ["x"]},
]
WORDS = ((5,), (6, 7), (9, 9, 9), (60,))


def params_of(asked: dict[str, Any], **fields: Any) -> SamplingParams:
    params = resolve_sampling(SamplingSettings(max_new_tokens=10, **fields), {}, asked)
    if not asked.get("bad_words"):
        return params
    from dataclasses import replace

    return replace(params, asked=with_bad_words(params.asked, WORDS))


def by_hand(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int],
    repetition: float,
) -> torch.Tensor:  # fmt: skip
    """One row as vLLM's sampler does it, token by token."""
    rules, found = read_asked(params.asked), logits.clone().float()
    if rules.allowed_token_ids:
        for token in set(range(len(found))) - set(rules.allowed_token_ids):
            found[token] = -torch.inf
    for word in rules.bad_words_ids:
        before = list(word[:-1])
        if len(word) <= len(output) + 1 and output[len(output) - len(before) :] == before:
            found[word[-1]] = -torch.inf
    if len(output) < rules.min_tokens:
        for token in (tiny.EOS, *rules.stop_token_ids):
            found[token] = -torch.inf
    for token, bias in rules.logit_bias.items():
        found[token] += bias
    for token in {*prompt, *output}:
        found[token] = found[token] / repetition if found[token] > 0 else found[token] * repetition
    for token, times in Counter(output).items():
        found[token] -= rules.frequency_penalty * times
        found[token] -= rules.presence_penalty
    return found


@pytest.mark.parametrize("seed", range(4))
def test_all_rows_at_once_are_as_each_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    params = [params_of(asked) for asked in ASKED] * 3
    prompts = [[draw.randrange(4, tiny.VOCABULARY) for _ in range(9)] for _ in params]
    outputs = [
        [draw.choice([5, 6, 7, 9, 60, 61]) for _ in range(draw.randrange(9))] for _ in params
    ]
    logits = torch.randn(
        len(params), tiny.VOCABULARY, generator=torch.Generator().manual_seed(seed)
    )
    before = logits.clone()
    scores, left = Sampler(tiny.load_tiny()).apply_rules(
        logits, params, lambda i: Context(prompts[i], outputs[i])
    )
    assert torch.equal(logits, before)
    for row, row_params in enumerate(params):
        repetition = ASKED[row % len(ASKED)].get("repetition_penalty", 1.0)
        expected = by_hand(logits[row], row_params, prompts[row], outputs[row], repetition)
        assert torch.allclose(scores[row], expected, atol=1e-5), ASKED[row % len(ASKED)]
        assert not left[row].asked and not left[row].rules


def test_counts_that_grow_are_those_of_the_whole() -> None:
    draw, counts, output = random.Random(1), TokenCounts(), list[int]()
    for _ in range(300):
        output += [draw.randrange(120) for _ in range(draw.randrange(3))]
        ids, times = counts.of(output)
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == Counter(output)
    both = counts.with_prompt([3, 200, 3], output)
    assert both.tolist() == sorted({3, 200, *output})


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_engine_and_baseline_say_the_same_and_its_replay_agrees(
    asked: dict[str, Any], temperature: float
) -> None:
    prompts = tiny.random_prompts(random.Random(6), 8)
    params = params_of(asked, temperature=temperature)
    plan = tiny.plan_of(prompts, (params,))
    loaded = tiny.load_tiny()
    found = run(PrefixEngine(loaded, EngineSettings()), plan)
    naive = NaiveEngine(loaded)
    theirs = run(naive, plan)
    for sequence, done in found.items():
        assert done.token_ids == theirs[sequence].token_ids
        assert done.finish_reason == theirs[sequence].finish_reason
        prompt = plan.prompt_token_ids(sequence).tolist()
        replay = naive.replay(prompt, done.token_ids, params, plan.noise_key_of(sequence))
        assert tuple(replay.predicted.tolist()) == done.token_ids and not replay.deficit.any()
        rules = read_asked(params.asked)
        assert len(done.token_ids) >= rules.min_tokens
        if rules.allowed_token_ids:
            assert set(done.token_ids) <= set(rules.allowed_token_ids)
        ends = {tiny.EOS, *rules.stop_token_ids}
        assert not ends & set(done.token_ids[:-1])
        assert (done.finish_reason == "stop") == (done.token_ids[-1] in ends)


def test_a_row_without_rules_is_chosen_from_the_same_bits_beside_rows_with_some() -> None:
    prompts = tiny.random_prompts(random.Random(9), 12)
    free = (tiny.GREEDY, tiny.SAMPLED)
    loaded, chosen = tiny.load_tiny(), [i % 2 for i in range(12)]
    alone = run(PrefixEngine(loaded, EngineSettings()), tiny.plan_of(prompts, free, chosen))
    mixed = tiny.plan_of(
        prompts * 2, (*free, params_of(ASKED[2], temperature=0.8)), chosen + [2] * 12
    )
    hooks, seen = tiny.watch_logits()
    beside = run(PrefixEngine(loaded, EngineSettings()), mixed, hooks=hooks)
    first = tiny.plan_of(prompts, free, chosen)
    for row in range(12):
        own, other = int(first.sequence_of_row[row]), int(mixed.sequence_of_row[row])
        assert alone[own].token_ids == beside[other].token_ids
    assert seen


def test_rules_are_asked_of_the_rows_that_have_some_alone() -> None:
    logits = torch.randn(4, tiny.VOCABULARY)
    params = [
        tiny.GREEDY,
        params_of(ASKED[0]),
        tiny.SAMPLED,
        params_of({"repetition_penalty": 2.0}),
    ]
    asked: list[int] = []

    def context_of(row: int) -> Context:
        asked.append(row)
        return Context([5, 6], [7])

    keys = np.zeros(4, np.uint64)
    Sampler(tiny.load_tiny()).sample(logits, params, keys, np.ones(4, np.int64), context_of)
    assert sorted(asked) == [1, 3]


def test_a_stop_string_within_the_first_tokens_does_not_count() -> None:
    def is_stopped(token_ids: Any, stop: tuple[str, ...], prompt: Any) -> bool:
        return 7 in list(token_ids)

    params = resolve_sampling(
        SamplingSettings(max_new_tokens=9), {},
        {"stop": ("x",), "min_tokens": 3, "allowed_token_ids": [7]},
    )  # fmt: skip
    control = RunControl(is_stopped=is_stopped)
    plan = tiny.plan_of([[5, 6]], (params,))
    for engine in (PrefixEngine(tiny.load_tiny(), EngineSettings()), NaiveEngine(tiny.load_tiny())):
        (done,) = run(engine, plan, control).values()
        assert done.token_ids == (7, 7, 7, 7) and done.finish_reason == "stop"


def test_nothing_is_done_to_a_row_that_asks_for_no_logit() -> None:
    params = params_of({"stop_token_ids": [7], "skip_special_tokens": False})
    scores = torch.randn(1, tiny.VOCABULARY)
    before = scores.clone()
    adjust(scores, [params], [Context([5], [6])], {tiny.EOS})
    assert torch.equal(scores, before)


def test_what_a_device_has_chosen_is_taken_for_rows_without_rules_alone() -> None:
    """A recorded step brings the likeliest tokens with it, of the logits as they are."""
    logits = torch.zeros(3, tiny.VOCABULARY)
    logits[:, 40], logits[:, 50] = 2.0, 1.0
    params = [tiny.GREEDY, params_of({"logit_bias": {40: -9.0}}), tiny.GREEDY]
    device = Sampled(np.array([41, 41, 42]), np.array([True, True, False]))
    keys, at = np.zeros(3, np.uint64), np.zeros(3, np.int64)
    found = Sampler(tiny.load_tiny()).sample(
        logits, params, keys, at, lambda i: Context([5], []), device
    )
    assert found.token_ids.tolist() == [41, 50, 42]
    assert found.is_finite.tolist() == [True, True, False]
    assert device.token_ids.tolist() == [41, 41, 42]
