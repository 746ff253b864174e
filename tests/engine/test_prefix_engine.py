"""The engine against plain transformers: every logit, every token, every count."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.base import RunControl
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, ModelError
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny

ALL = (tiny.GREEDY, tiny.LONGER, tiny.SAMPLED)


def run(
    engine: PrefixEngine | NaiveEngine, plan: Plan, control: RunControl | None = None
) -> dict[int, Completion]:
    every = np.arange(len(plan.sequences))
    done = list(engine.generate(plan, every, control or RunControl()))
    assert len({c.sequence for c in done}) == len(done)
    return {c.sequence: c for c in done}


def random_plan(seed: int, min_prefix_tokens: int) -> Plan:
    draw = random.Random(seed)
    prompts = tiny.random_prompts(draw)
    return tiny.plan_of(
        prompts, ALL, [draw.choice([0, 0, 1, 2]) for _ in prompts], min_prefix_tokens
    )


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("seed", "min_prefix_tokens", "max_batch_tokens", "max_rows"),
    [(0, 1, 16, 256), (1, 4, 64, 3), (2, 16, 4096, 256), (3, 1000, 16, 1), (4, 4, 4096, 7)],
)
def test_every_logit_equals_plain_attention(
    family: str,
    seed: int,
    min_prefix_tokens: int,
    max_batch_tokens: int,
    max_rows: int,
    kernels: str,
) -> None:
    """Went red when a chunk's earlier keys, a copied edge or a level was left out."""
    plan = random_plan(seed, min_prefix_tokens)
    loaded = tiny.load_tiny(family)
    settings = EngineSettings(max_batch_tokens=max_batch_tokens, max_rows=max_rows, kernels=kernels)
    engine = PrefixEngine(loaded, settings)
    seen: dict[tuple[int, int], Tensor] = {}
    engine.logits_probe = lambda rows, at, logits: seen.update(
        zip(zip(rows, at, strict=True), logits.clone(), strict=True)
    )
    done = run(engine, plan)
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


@pytest.mark.parametrize("seed", range(6))
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


def test_drain_finishes_live_rows_and_admits_no_more() -> None:
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


def test_nan_logits_fail_their_row_and_leave_the_neighbours() -> None:
    plan = tiny.plan_of([[9, 10, 11], [9, 10, 12], [9, 10, 13]], (tiny.LONGER,))
    loaded = tiny.load_tiny()
    engine = PrefixEngine(loaded, EngineSettings())
    clean = run(engine, plan)

    def poison(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            if sequence == 1 and position == 2:
                logits[i] = float("nan")

    engine.logits_probe = poison
    done = run(engine, plan)
    assert (done[1].finish_reason, done[1].error_type) == ("error", "NonFiniteLogits")
    assert done[0].token_ids == clean[0].token_ids
    assert done[2].token_ids == clean[2].token_ids


def test_stop_strings_end_a_row() -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, stop=("x",))
    plan = tiny.plan_of([[9, 10], [9, 11]], (params,))
    control = RunControl(is_stopped=lambda ids, stop: len(ids) >= 4)
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
    loaded = tiny.load_tiny("mistral")
    loaded.model.config.sliding_window = 8
    with pytest.raises(ModelError, match="sliding window of 8.*--engine naive"):
        PrefixEngine(loaded, EngineSettings())


def test_plain_call_of_a_switched_model_is_refused() -> None:
    """Without our batch there would be no mask at all: better an error than a wrong answer."""
    loaded = tiny.load_tiny()
    run(PrefixEngine(loaded, EngineSettings(kernels="torch")), tiny.plan_of([[5, 6]]))
    with pytest.raises(EngineError, match="packed batch"):
        loaded.model(torch.tensor([[1, 2, 3]]))
