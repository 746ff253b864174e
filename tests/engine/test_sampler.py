"""Rules of generation against `generate()` itself, for every rule, alone and in a batch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from pipeline.engine.base import RunControl
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.request_logits import Context
from pipeline.engine.sampler import Sampler
from pipeline.engine.sampling import draw_tokens, sample_next_token, truncated_cdf
from pipeline.generation import resolve_sampling
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import EngineSettings
from tests.engine import tiny

PROMPTS = [p for p in tiny.random_prompts(random.Random(3)) if len(p) > 1][:10]
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[5], [6, 7], [60]]},
    {"sequence_bias": [[[9], 30.0], [[9, 11], -50.0]]},
    {"min_length": 30},
    {"min_new_tokens": 6},
    {"forced_bos_token_id": 17},
    {"forced_eos_token_id": tiny.EOS},
    {"forced_eos_token_id": [tiny.EOS, 9]},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": [2, 1.9]},
    {"suppress_tokens": list(range(4, 50))},
    {"begin_suppress_tokens": list(range(40, 97))},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [5, 8]},
    {},
]


def params_of(rules: dict[str, Any], **fields: Any) -> SamplingParams:
    settings = SamplingSettings(**{"max_new_tokens": 12} | fields)
    return resolve_sampling(settings, rules, {})


def generated(model: Any, prompt: list[int], rules: dict[str, Any]) -> tuple[int, ...]:
    """What `generate()` says when the rules are the model's own defaults."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **rules, eos_token_id=tiny.EOS, pad_token_id=0, max_new_tokens=12
    )
    try:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_rules_in_one_batch_say_what_generate_says(family: str) -> None:
    engine, model = PrefixEngine(tiny.load_tiny(family), EngineSettings()), tiny.build_model(family)
    some = PROMPTS[:3]
    prompts = [prompt for _ in RULES for prompt in some]
    of_row = [number for number in range(len(RULES)) for _ in some]
    without = [generated(model, prompt, {}) for prompt in some] * len(RULES)
    plan = tiny.plan_of(prompts, tuple(map(params_of, RULES)), of_row)
    everything = np.arange(len(plan.sequences))
    done = {d.sequence: d for d in engine.generate(plan, everything, RunControl())}
    differs = set()
    for row, (prompt, number) in enumerate(zip(prompts, of_row, strict=True)):
        expected = generated(model, prompt, RULES[number])
        assert done[int(plan.sequence_of_row[row])].token_ids == expected, RULES[number]
        if expected != without[row]:
            differs.add(number)
    assert len(differs) >= 10  # each of them does something to some prompt of some family


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_baseline_applies_the_rules_too(rules: dict[str, Any]) -> None:
    naive, params = NaiveEngine(tiny.load_tiny()), params_of(rules)
    for prompt in PROMPTS[:2]:
        expected = generated(naive.loaded.model, prompt, rules)
        assert naive.generate_one(prompt, params) == expected
        replay = naive.replay(prompt, expected, params, 0)
        assert replay.predicted.tolist() == list(expected) and not replay.deficit.any()


def test_a_rule_of_the_model_that_the_row_overrules_is_off_in_the_baseline() -> None:
    naive = NaiveEngine(tiny.load_tiny())
    naive.loaded.model.generation_config.repetition_penalty = 1.8
    naive.loaded.model.generation_config.num_beams = 3
    own = {"repetition_penalty": 1.8, "num_beams": 3}
    settings = SamplingSettings(
        max_new_tokens=12, generation_options={"repetition_penalty": None, "num_beams": 1}
    )
    params = resolve_sampling(settings, own, {})
    for prompt in PROMPTS:
        assert naive.generate_one(prompt, params) == generated(naive.loaded.model, prompt, {})


WARPERS: list[dict[str, Any]] = [
    {"min_p": 0.2}, {"top_h": 0.5}, {"typical_p": 0.6}, {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05}, {"min_p": 0.1, "repetition_penalty": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("rules", WARPERS, ids=str)
def test_a_sampled_row_keeps_the_tokens_that_transformers_keeps(rules: dict[str, Any]) -> None:
    loaded = tiny.load_tiny()
    params = params_of(rules, temperature=0.9, top_p=0.95, top_k=40)
    logits = torch.randn(3, tiny.VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    scores, left = Sampler(loaded).apply_rules(
        logits, [params] * 3, lambda i: Context(PROMPTS[i], [4, 5][:i])
    )
    config = GenerationConfig(do_sample=True, temperature=0.9, top_p=0.95, top_k=40, **rules)
    for i in range(3):
        ids = torch.tensor([[*PROMPTS[i], *[4, 5][:i]]])
        theirs = loaded.model._get_logits_processor(config, ids.shape[1], ids)(
            ids, logits[i : i + 1].clone()
        )
        assert torch.equal(scores[i : i + 1], theirs)
    order, cumulative = truncated_cdf(scores.double(), left)
    assert 0 < int((scores > -torch.inf).sum()) < scores.numel()
    assert torch.isfinite(cumulative).all() and order.shape == scores.shape


@pytest.mark.parametrize("rules", [*WARPERS, *RULES[:4]], ids=str)
def test_sampling_with_rules_does_not_depend_on_the_batch(rules: dict[str, Any]) -> None:
    params = (params_of(rules, temperature=1.5, seed=3), params_of({}, temperature=1.5, seed=3))
    loaded = tiny.load_tiny()
    plan = tiny.plan_of(PROMPTS, params, [i % 2 for i in range(len(PROMPTS))])
    everything = np.arange(len(plan.sequences))
    answers = [
        {
            d.sequence: d.token_ids
            for d in PrefixEngine(loaded, EngineSettings(max_rows=rows)).generate(
                plan, everything, RunControl()
            )
        }
        for rows in (1, 256)
    ]
    assert answers[0] == answers[1]
    naive = {
        d.sequence: d.token_ids
        for d in NaiveEngine(loaded).generate(plan, everything, RunControl())
    }
    assert naive == answers[0]


def test_probabilities_that_are_no_numbers_are_no_choice() -> None:
    logits = torch.zeros(4, 7)
    logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    keys, at = np.arange(4, dtype=np.uint64), np.zeros(4, np.int64)
    for params in (SamplingParams(temperature=0.7), SamplingParams()):
        chosen = sample_next_token(logits, [params] * 4, keys, at)
        assert chosen.is_finite.tolist() == [False, False, False, True]


def test_noise_next_to_one_chooses_the_last_token_that_is_kept() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(temperature=1.0, top_k=3)
    chosen, _ = draw_tokens(logits, [params], np.array([1.0]))
    assert chosen.tolist() == [2]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.5)])
def test_a_model_without_numbers_fails_its_rows_in_the_naive_engine(params: SamplingParams) -> None:
    loaded = tiny.load_tiny()
    loaded.model.get_output_embeddings().weight.data[5] = torch.nan
    plan = tiny.plan_of(PROMPTS[:2], (params,))
    done = list(NaiveEngine(loaded).generate(plan, np.arange(2), RunControl()))
    assert [d.error_type for d in done] == ["NonFiniteLogits"] * 2
