"""The engine against plain transformers: every logit, every token, every count."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import kv_cache, kv_guard
from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.forward import Forward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, ModelError
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.sweeps import diagonal, sweep

ALL = (tiny.GREEDY, tiny.LONGER, tiny.SAMPLED)


def run(
    engine: PrefixEngine | NaiveEngine,
    plan: Plan,
    control: RunControl | None = None,
    hooks: EngineHooks = NO_HOOKS,
) -> dict[int, Completion]:
    every = np.arange(len(plan.sequences))
    done = list(engine.generate(plan, every, control or RunControl(), hooks))
    assert len({c.sequence for c in done}) == len(done)
    return {c.sequence: c for c in done}


def random_plan(seed: int, min_prefix_tokens: int) -> Plan:
    draw = random.Random(seed)
    prompts = tiny.random_prompts(draw)
    return tiny.plan_of(
        prompts, ALL, [draw.choice([0, 0, 1, 2]) for _ in prompts], min_prefix_tokens
    )


LIMITS = [(0, 1, 16, 256), (1, 4, 64, 3), (2, 16, 4096, 256), (3, 1000, 16, 1), (4, 4, 4096, 7)]
"""Seed, and tokens of a prefix, tokens of a batch and rows at most."""


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(("family", "limits"), diagonal(tiny.FAMILIES, LIMITS))
def test_every_logit_equals_plain_attention(
    family: str, limits: tuple[int, int, int, int], kernels: Literal["auto", "torch"]
) -> None:
    """Went red when a chunk's earlier keys, a copied edge or a level was left out."""
    seed, min_prefix_tokens, max_batch_tokens, max_rows = limits
    plan = random_plan(seed, min_prefix_tokens)
    loaded = tiny.load_tiny(family)
    settings = EngineSettings(max_batch_tokens=max_batch_tokens, max_rows=max_rows, kernels=kernels)
    engine = PrefixEngine(loaded, settings)
    hooks, seen = tiny.watch_logits()
    done = run(engine, plan, hooks=hooks)
    assert len(done) == len(plan.sequences)
    loaded.model.set_attn_implementation("eager")
    for sequence, completion in done.items():
        prompt = plan.prompt_token_ids(sequence).tolist()
        ids = torch.tensor([[*prompt, *completion.token_ids[:-1]]])
        expected = loaded.model(ids).logits[0, len(prompt) - 1 :]
        got = torch.stack([seen[sequence, i] for i in range(len(completion.token_ids))])
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_equal_the_naive_engine(family: str) -> None:
    plan = random_plan(11, 4)
    loaded = tiny.load_tiny(family)
    ours = run(PrefixEngine(loaded, EngineSettings()), plan)
    plain = run(NaiveEngine(loaded), plan)
    for sequence, completion in plain.items():
        assert ours[sequence].token_ids == completion.token_ids
        assert ours[sequence].finish_reason == completion.finish_reason


@pytest.mark.parametrize("seed", sweep(range(6), (0, 1)))
def test_every_distinct_token_is_prefilled_once(seed: int) -> None:
    plan = random_plan(seed, 4)
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings(max_rows=5, max_batch_tokens=32))
    done = run(engine, plan)
    counters = engine.counters
    assert counters.prefilled_tokens == plan.tree.unique_tokens
    assert counters.prefilled_tokens + counters.cached_tokens == plan.prompt_lengths.sum()
    assert counters.generated_tokens == sum(len(c.token_ids) for c in done.values())
    assert 0 < counters.busy_s <= counters.span_s


def test_budget_makes_rows_wait_and_is_never_exceeded() -> None:
    """The free run peaks far above the budget, so the bound is a real one."""
    plan = random_plan(5, 4)
    loaded = tiny.load_tiny()
    free = PrefixEngine(loaded, EngineSettings())
    expected = run(free, plan)
    budget = free.counters.peak_kv_bytes // 3
    tight = PrefixEngine(loaded, EngineSettings(kv_budget=budget))
    done = run(tight, plan)
    assert tight.counters.peak_kv_bytes <= budget
    assert tight.counters.num_forwards > free.counters.num_forwards
    assert {s: c.token_ids for s, c in done.items()} == {
        s: c.token_ids for s, c in expected.items()
    }


def test_a_row_larger_than_the_budget_is_an_error_and_the_others_run() -> None:
    plan = tiny.plan_of([[5] * 10, [6] * 200, [7] * 12])
    loaded = tiny.load_tiny()
    budget = 30 * loaded.shape.kv_bytes_per_token()
    done = run(PrefixEngine(loaded, EngineSettings(kv_budget=budget)), plan)
    reasons = {int(plan.sequences.row[s]): c.error_type for s, c in done.items()}
    assert reasons == {0: None, 1: "KVBudgetExceeded", 2: None}
    message = next(c.error_message for c in done.values() if c.error_type)
    assert message is not None and "--kv-budget" in message


def test_a_part_of_the_sequences_gives_the_same_answers() -> None:
    """Resume runs a subset; a group may have lost all but one of its rows."""
    plan = random_plan(8, 4)
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    whole = run(engine, plan)
    for step in (2, 3, 7):
        chosen = np.arange(1, len(plan.sequences), step)
        some = {c.sequence: c for c in engine.generate(plan, chosen, RunControl())}
        assert sorted(some) == chosen.tolist()
        assert all(some[s].token_ids == whole[s].token_ids for s in some)


def test_drain_finishes_live_rows_and_admits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_guard, "_LEAST_INTERVAL_S", 0.0)  # rows are yielded as they end
    plan = tiny.plan_of([[9, i] for i in range(10, 40)], (tiny.LONGER,))
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings(max_rows=4))
    done: list[Completion] = []
    control = RunControl(should_drain=lambda: len(done) > 0)
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), control):
        done.append(completion)
    assert 4 <= len(done) < len(plan.sequences)
    assert all(len(c.token_ids) == tiny.LONGER.max_new_tokens for c in done)


def test_abort_returns_at_once() -> None:
    plan = tiny.plan_of([[9, i] for i in range(10, 40)])
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    control = RunControl(should_abort=lambda: True)
    assert list(engine.generate(plan, np.arange(3), control)) == []


@pytest.mark.fault(
    "NaN logits in one row",
    injected="NaN for one row of three at its third token",
    outcome="NonFiniteLogits; the tokens of the neighbours are unchanged",
)
def test_nan_logits_fail_their_row_and_leave_the_neighbours() -> None:
    plan = tiny.plan_of([[9, 10, 11], [9, 10, 12], [9, 10, 13]], (tiny.LONGER,))
    loaded = tiny.load_tiny()
    engine = PrefixEngine(loaded, EngineSettings())
    clean = run(engine, plan)

    def poison(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            if sequence == 1 and position == 2:
                logits[i] = float("nan")

    done = run(engine, plan, hooks=EngineHooks(on_logits=poison))
    assert (done[1].finish_reason, done[1].error_type) == ("error", "NonFiniteLogits")
    assert done[0].token_ids == clean[0].token_ids
    assert done[2].token_ids == clean[2].token_ids


def test_stop_strings_end_a_row() -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, stop=("x",))
    plan = tiny.plan_of([[9, 10], [9, 11]], (params,))
    control = RunControl(is_stopped=lambda ids, stop, prompt: len(ids) >= 4)
    done = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan, control)
    assert {(len(c.token_ids), c.finish_reason) for c in done.values()} == {(4, "stop")}


def test_cached_tokens_are_charged_to_the_first_row() -> None:
    prefix = list(range(10, 40))
    plan = tiny.plan_of([[*prefix, 50, 51], [*prefix, 60], prefix])
    done = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan)
    by_row = {int(plan.sequences.row[s]): c.cached_tokens for s, c in done.items()}
    assert by_row == {2: 0, 0: 30, 1: 30}


def test_bfloat16_differs_by_near_ties_only() -> None:
    plan = random_plan(2, 4)
    loaded = tiny.load_tiny(dtype=torch.bfloat16)
    done = run(PrefixEngine(loaded, EngineSettings()), plan)
    naive = NaiveEngine(loaded)
    for sequence, completion in done.items():
        params = plan.params[int(plan.sequences.params[sequence])]
        if params.is_greedy:
            prompt = plan.prompt_token_ids(sequence).tolist()
            replay = naive.replay(prompt, completion.token_ids, params, 0)
            assert replay.deficit.max() < 0.5


def test_unsupported_models_are_refused_by_name() -> None:
    loaded = tiny.load_tiny("llama")
    loaded.model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ModelError, match="rotary frequencies.*--engine naive"):
        PrefixEngine(loaded, EngineSettings())


def test_plain_call_of_a_switched_model_is_refused() -> None:
    """Without our batch there would be no mask at all: better an error than a wrong answer."""
    loaded = tiny.load_tiny()
    run(PrefixEngine(loaded, EngineSettings(kernels="torch")), tiny.plan_of([[5, 6]]))
    with pytest.raises(EngineError, match="packed batch"):
        loaded.model(torch.tensor([[1, 2, 3]]))


class FullMemory:
    """A forward that finds memory for few tokens only, as a device under load would."""

    name = "full memory"

    def __init__(self, forward: Forward, most_tokens: int) -> None:
        self._forward = forward
        self.most_tokens = most_tokens
        self.refused = 0

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        logits = self._forward(batch, cache, keep)  # half done: the retry must overwrite it
        if batch.input_ids.shape[1] > self.most_tokens:
            self.refused += 1
            raise torch.OutOfMemoryError("planted")
        return logits


def engine_with(most_tokens: int) -> tuple[PrefixEngine, FullMemory]:
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    forward = FullMemory(engine.backend.forward, most_tokens)
    return tiny.with_backend(engine, forward=forward), forward


@pytest.mark.fault(
    "out of memory in prefill",
    injected="no memory for more than 1, 3 or 40 tokens at once",
    outcome="halved and done again; the same answers, each token once",
)
@pytest.mark.parametrize("most_tokens", [1, 3, 40])
def test_out_of_memory_halves_the_batch_and_changes_no_answer(most_tokens: int) -> None:
    """Went red when the second half was dropped, and when the first was counted twice."""
    plan = random_plan(4, 4)
    expected = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan)
    engine, forward = engine_with(most_tokens)
    done = run(engine, plan)
    assert {s: c.token_ids for s, c in done.items()} == {
        s: c.token_ids for s, c in expected.items()
    }
    assert engine.counters.memory_retries == forward.refused > 0
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens


@pytest.mark.fault(
    "out of memory in prefill",
    injected="no memory for a single token",
    outcome="each row is an error (OutOfMemory); the run ends",
)
def test_without_any_memory_rows_become_errors_and_the_engine_ends() -> None:
    plan = random_plan(4, 4)
    engine, _ = engine_with(0)
    done = run(engine, plan)
    assert len(done) == len(plan.sequences)
    assert {c.error_type for c in done.values()} == {"OutOfMemory"}
    assert all("planted" in (c.error_message or "") for c in done.values())


@pytest.mark.fault(
    "out of memory in decode",
    injected="no memory from the third new token on",
    outcome="rows become errors (OutOfMemory), every row is there",
)
def test_memory_that_ends_while_rows_decode_costs_only_rows() -> None:
    plan = random_plan(4, 4)
    engine, forward = engine_with(10**9)

    def tighten(rows: list[int], at: list[int], logits: Tensor) -> None:
        if max(at) == 2:
            forward.most_tokens = 0

    done = run(engine, plan, hooks=EngineHooks(on_logits=tighten))
    assert len(done) == len(plan.sequences)
    assert "OutOfMemory" in {c.error_type for c in done.values()}


def test_a_fault_that_is_not_memory_is_not_hidden() -> None:
    engine, _ = engine_with(10**9)

    def fail(*_: object) -> None:
        torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(engine, random_plan(4, 4), hooks=EngineHooks(on_logits=fail))


@pytest.mark.fault(
    "out of memory where KV grows",
    injected="an arena that the machine refuses",
    outcome="halved until it fits; the same answers",
)
def test_a_kv_arena_too_large_for_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(4, 4)
    expected = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan)
    asked: list[int] = []
    whole = kv_cache.KVCache

    def small(shape: tuple[int, int, int], capacity: int, like: Tensor) -> KVCache:
        asked.append(capacity)
        if capacity > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")
        return whole(shape, capacity, like)

    monkeypatch.setattr(kv_cache, "KVCache", small)
    done = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan)
    assert asked[0] > 300 >= asked[-1] > 150
    assert {s: c.token_ids for s, c in done.items()} == {
        s: c.token_ids for s, c in expected.items()
    }
