"""What masks do to logits, and when they are made at all."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.base import RunControl
from pipeline.engine.guides import Guide, prepare
from pipeline.engine.masks import allows, apply, likeliest_allowed
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.sampling import likeliest_token
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.automata import Automata, Thinks, draw_constraint
from tests.engine.tiny import EOS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.bfloat16, torch.float32]))
def test_the_likeliest_allowed_token_is_that_of_masked_logits(
    seed: int, dtype: torch.dtype
) -> None:
    """Ties go to the first; also of few bits, of none, and of ids that only the model knows."""
    draw = np.random.default_rng(seed)
    width = int(draw.integers(40, 6000))
    known = int(draw.integers(20, width + 200))
    logits = torch.from_numpy(draw.integers(-3, 4, (6, width)).astype(np.float32)).to(dtype)
    shares = draw.choice([0.0, 0.0005, 0.1, 0.9, 1.0], 6)
    bits = draw.random((6, -(-known // 32) * 32)) < shares[:, None]
    masks = list(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    rows = draw.permutation(6)[:4].tolist()
    before = logits.clone()
    found = likeliest_allowed(logits, rows, [masks[row] for row in rows], likeliest_token)
    assert torch.equal(logits, before)
    apply(logits, rows, [masks[row] for row in rows])
    expected = likeliest_token(logits[rows])
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.is_finite.tolist() == expected.is_finite.tolist()


def test_no_mask_is_made_where_the_likeliest_token_may_follow() -> None:
    """Nor where the answer may not end, so that nobody must know whether it is over."""
    endless = json.dumps({"next": [{str(t): 0 for t in range(tiny.VOCABULARY) if t != EOS}],
                          "ends": []})  # fmt: skip
    params = replace(tiny.GREEDY, constraint=endless, ignore_eos=True, max_new_tokens=9)
    plan = tiny.plan_of([[9, i] for i in range(10, 40)], (params,))
    grammars, loaded = Automata(), tiny.load_tiny()
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[EOS] = 0  # so it is never the likeliest
    engine = PrefixEngine(loaded, EngineSettings())
    said = engine.generate(plan, np.arange(len(plan.sequences)), RunControl(grammars=grammars))
    assert {len(done.token_ids) for done in said} == {9}
    assert grammars.num_fills == 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [None, 0, 2])
def test_whether_a_token_may_follow_is_what_the_mask_says(seed: int, budget: int | None) -> None:
    draw = random.Random(seed)
    grammars = Automata(Thinks())
    constraint = draw_constraint(draw) if seed % 3 else ""
    params = SamplingParams(
        max_new_tokens=30, constraint=constraint, thinking_budget=budget, ignore_eos=seed % 4 == 0
    )
    prompt = [9, 5] if seed % 2 else [9, 8]
    asked, seen = (Guide(grammars, params, prompt, frozenset({EOS})) for _ in range(2))
    for _ in range(30):
        prepare(grammars, [seen], tiny.VOCABULARY)
        if seen.mask is None:
            break
        bits = [token for token in range(tiny.VOCABULARY) if allows(seen.mask, token)]
        assert [t for t in range(tiny.VOCABULARY) if asked.allows(t)] == bits
        forced = asked.next_forced()
        assert forced is None or bits == [forced]
        if not (others := [token for token in bits if token != EOS]):
            break
        token_id = draw.choice(others)
        asked.accept(token_id)
        seen.accept(token_id)
