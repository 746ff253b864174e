"""Log-probabilities against transformers, and what asking for them does to others: nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.engine.base import EngineCapabilities, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError
from pipeline.generation import resolve_sampling
from pipeline.records import Completion, SamplingParams
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import run

PROMPTS = tiny.random_prompts(random.Random(5))
ASKED = (
    replace(tiny.GREEDY, logprobs=3),
    replace(tiny.SAMPLED, logprobs=0),
    resolve_sampling(
        SamplingSettings(max_new_tokens=6, temperature=0.7, top_k=5),
        {"repetition_penalty": 1.7},
        {"logprobs": 20, "frequency_penalty": 1.0},
    ),
)
ROWS = [i % 3 for i in range(len(PROMPTS))]


def expected(model: torch.nn.Module, prompt: list[int], done: Completion) -> torch.Tensor:
    """[n, V] of plain transformers, in float64."""
    ids = torch.tensor([[*prompt, *done.token_ids[:-1]]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("engine", [PrefixEngine, NaiveEngine])
def test_they_are_those_of_transformers_before_any_rule(
    family: str, engine: type[PrefixEngine] | type[NaiveEngine]
) -> None:
    loaded = tiny.load_tiny(family)
    made = PrefixEngine(loaded, EngineSettings()) if engine is PrefixEngine else NaiveEngine(loaded)
    plan = tiny.plan_of(PROMPTS, ASKED, ROWS)
    done = run(made, plan)
    model = tiny.build_model(family)
    for sequence, found in done.items():
        count = plan.params_of(sequence).logprobs
        assert count is not None and len(found.logprobs) == len(found.token_ids) > 0
        truth = expected(model, plan.prompt_token_ids(sequence).tolist(), found)
        for at, (token_id, said) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
            assert said.logprob == pytest.approx(float(truth[at, token_id]), abs=1e-4)
            assert len(said.top_ids) == len(said.top_logprobs) == count
            best = truth[at].topk(count).values.tolist() if count else []
            assert said.top_logprobs == pytest.approx(best, abs=1e-4)
            own = [float(truth[at, token]) for token in said.top_ids]
            assert own == pytest.approx(list(said.top_logprobs), abs=1e-4)


@pytest.mark.parametrize("max_rows", [3, 256])
def test_rows_that_do_not_ask_keep_their_bits_and_rows_that_do_their_answers(max_rows: int) -> None:
    loaded, settings = tiny.load_tiny(), EngineSettings(max_rows=max_rows)
    plain = tuple(replace(params, logprobs=None) for params in ASKED)
    half = (*ASKED[:1], *plain[1:])
    found = []
    for params in (plain, half):
        hooks, seen = tiny.watch_logits()
        plan = tiny.plan_of(PROMPTS, params, ROWS)
        found.append((run(PrefixEngine(loaded, settings), plan, hooks=hooks), seen))
    (without, bits), (beside, same) = found
    assert {s: c.token_ids for s, c in without.items()} == {
        s: c.token_ids for s, c in beside.items()
    }
    assert bits.keys() == same.keys()
    assert all(torch.equal(bits[key], same[key]) for key in bits)
    asked = [s for s in beside if plan.params_of(s).logprobs is not None]
    assert asked and all(bool(beside[s].logprobs) == (s in asked) for s in beside)


def test_a_row_that_gives_way_and_comes_back_has_one_for_each_token() -> None:
    loaded = tiny.load_tiny()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, logprobs=2)
    prompts = [[5 + row, 9, 11] for row in range(6)]
    plan = tiny.plan_of(prompts, (params,))
    budget = 190 * loaded.shape.kv_bytes_per_token("float32")
    engine = PrefixEngine(loaded, EngineSettings(kv_budget=budget))
    done = run(engine, plan)
    assert engine.counters.recomputed_tokens
    free = run(PrefixEngine(loaded, EngineSettings()), plan)
    for sequence, found in done.items():
        assert len(found.logprobs) == 60
        assert found.token_ids == free[sequence].token_ids
        theirs = [said.logprob for said in free[sequence].logprobs]
        assert [said.logprob for said in found.logprobs] == pytest.approx(theirs, abs=1e-4)


def test_they_are_of_the_tokens_that_a_caller_forces() -> None:
    plan = tiny.plan_of(PROMPTS[:3], (replace(tiny.LONGER, logprobs=1),))
    hooks = EngineHooks(force_tokens=lambda sequences, at: [7] * len(sequences))
    done = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan, hooks=hooks)
    model = tiny.build_model("llama")
    for sequence, found in done.items():
        truth = expected(model, plan.prompt_token_ids(sequence).tolist(), found)
        said = [position.logprob for position in found.logprobs]
        assert said == pytest.approx(truth[:, 7].tolist(), abs=1e-4)


def test_an_engine_that_has_none_refuses_instead_of_leaving_them_out() -> None:
    plan = tiny.plan_of([[5, 6]], (replace(tiny.GREEDY, logprobs=1),))
    with pytest.raises(EngineError, match="gives no logprobs"):
        EchoEngine().generate(plan, np.arange(1), RunControl())
    assert not EngineCapabilities().gives_logprobs
