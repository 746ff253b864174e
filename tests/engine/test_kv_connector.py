"""Runs that begin with the KV of earlier ones: same answers, and every count adds up."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.base import EngineHooks
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.plan.plan import Plan
from pipeline.plan.token_table import Ids
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import random_plan, run
from tests.sweeps import diagonal, sweep


class TokenStore:
    """`KVConnector` with an entry per token, by the ids up to it: slow and plain."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, ...], Tensor] = {}
        self.fails = random.Random(0)
        self.failing = 0.0
        self.wanted = True
        self.failures = 0

    def stored_end(self, sequence: int, ids: Ids) -> int:
        return next(
            (i for i in range(len(ids)) if tuple(ids[: i + 1].tolist()) not in self.tokens),
            len(ids),
        )

    def load(self, sequence: int, ids: Ids, low: int, high: int) -> Tensor | None:
        assert low < high <= self.stored_end(sequence, ids[:high])
        if self.fails.random() < self.failing:
            self.failures += 1
            return None
        known = ids.tolist()
        return torch.stack([self.tokens[tuple(known[: i + 1])] for i in range(low, high)], dim=-2)

    def wants(self, key: int) -> bool:
        return self.wanted

    def keep(self, sequence: int, ids: Ids, low: int, high: int, kv: Tensor) -> None:
        assert kv.shape[-2] == high - low > 0
        for i in range(low, high):
            self.tokens[tuple(ids[: i + 1].tolist())] = kv[..., i - low, :]


def shared_tokens(plan: Plan) -> int:
    shared = plan.count_below(np.arange(len(plan.sequences))) > 1
    return int(plan.tree.edge_lengths[shared].sum())


@pytest.mark.parametrize(("family", "seed"), diagonal(tiny.FAMILIES, range(4)))
def test_a_second_run_loads_what_the_first_one_shared(family: str, seed: int) -> None:
    """Seen red: head copies left out of what is loaded; a prompt's last token not computed."""
    plan = random_plan(seed, [1, 4, 16, 1000][seed])
    loaded = tiny.load_tiny(family)
    store = TokenStore()
    first = PrefixEngine(loaded, EngineSettings(max_rows=5))
    expected = run(first, plan, hooks=EngineHooks(kv_connector=store))
    assert first.counters.loaded_tokens == 0
    second = PrefixEngine(loaded, EngineSettings(max_rows=7, max_batch_tokens=16))
    done = run(second, plan, hooks=EngineHooks(kv_connector=store))
    plain = run(NaiveEngine(loaded), plan)
    assert {s: c.token_ids for s, c in done.items()} == {s: c.token_ids for s, c in plain.items()}
    counters, unique = second.counters, plan.tree.unique_tokens
    assert counters.prefilled_tokens + counters.loaded_tokens == unique
    ending = len(set(plan.tree.terminal[plan.sequences.prompt].tolist()))
    assert shared_tokens(plan) - ending <= counters.loaded_tokens <= shared_tokens(plan)
    assert counters.prefilled_tokens + counters.cached_tokens == plan.prompt_lengths.sum()
    assert any(c.stored_tokens for c in done.values())
    assert not any(c.stored_tokens for c in expected.values())
    for sequence, completion in done.items():
        assert completion.stored_tokens < plan.prompt_lengths[sequence]


@pytest.mark.parametrize("seed", sweep(range(6), (0, 1, 2)))
def test_states_of_another_job_serve_at_any_depth_and_may_fail(seed: int) -> None:
    """Tonight's prompts are others than last night's, room is short, and every third load fails."""
    draw = random.Random(seed)
    base = tiny.random_prompts(draw, 20)
    tonight = [prompt[: draw.randrange(1, 90)] for prompt in base[:12]] + tiny.random_prompts(draw)
    tonight += [prompt + [5, 6] for prompt in base[12:]]
    loaded = tiny.load_tiny()
    store = TokenStore()
    before, after = tiny.plan_of(base), tiny.plan_of(tonight)
    first = PrefixEngine(loaded, EngineSettings())
    run(first, before, hooks=EngineHooks(kv_connector=store))
    for ids in draw.sample(sorted(store.tokens), len(store.tokens) // 10):
        del store.tokens[ids]  # and so all that lies behind it
    store.failing = 0.3
    free = PrefixEngine(loaded, EngineSettings())
    expected = run(free, after)
    budget = max(free.counters.peak_kv_bytes // 2, 130 * loaded.shape.kv_bytes_per_token())
    second = PrefixEngine(loaded, EngineSettings(kv_budget=budget, max_rows=6))
    done = run(second, after, hooks=EngineHooks(kv_connector=store))
    assert {s: c.token_ids for s, c in done.items()} == {
        s: c.token_ids for s, c in expected.items()
    }
    counters = second.counters
    assert counters.prefilled_tokens + counters.loaded_tokens == after.tree.unique_tokens
    assert counters.prefilled_tokens + counters.cached_tokens == after.prompt_lengths.sum()


def test_the_failing_loads_are_no_empty_test() -> None:
    """Of the six seeds above some load, and some fail to."""
    plan = random_plan(0, 4)
    loaded = tiny.load_tiny()
    store = TokenStore()
    engine = PrefixEngine(loaded, EngineSettings())
    run(engine, plan, hooks=EngineHooks(kv_connector=store))
    store.failing = 0.5
    run(engine, plan, hooks=EngineHooks(kv_connector=store))
    assert store.failures and engine.counters.loaded_tokens


def test_nothing_is_kept_that_nobody_wants() -> None:
    plan = random_plan(0, 4)
    store = TokenStore()
    store.wanted = False
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    run(engine, plan, hooks=EngineHooks(kv_connector=store))
    assert not store.tokens


def test_a_prompt_that_is_stored_to_its_end_still_computes_its_last_token() -> None:
    """Seen red: with all of it loaded there are no logits to begin with."""
    prefix = [7, 8, 9, 10, 11, 12]
    loaded = tiny.load_tiny()
    store = TokenStore()
    before, after = tiny.plan_of([[*prefix, 20], [*prefix, 21]]), tiny.plan_of([prefix])
    engine = PrefixEngine(loaded, EngineSettings())
    run(engine, before, hooks=EngineHooks(kv_connector=store))
    done = run(engine, after, hooks=EngineHooks(kv_connector=store))
    assert done[0].token_ids == run(NaiveEngine(loaded), after)[0].token_ids
    assert (engine.counters.prefilled_tokens, engine.counters.loaded_tokens) == (1, 5)
