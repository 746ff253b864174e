"""Strides: rows whose ends are seen a step late say what they say when asked step by step.

Most runs here are of a model whose next token follows from a sum over all that a query sees, which
must be each position before it once, so that a slot, a position or an item that is wrong by one
changes the answer or fails. Its oracle is a loop over lists.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.engine import live, recordings, scheduler, strides
from pipeline.engine.backend import Backend
from pipeline.engine.base import RunControl, TokenIds
from pipeline.engine.cuda_graphs import DecodeRunner
from pipeline.engine.forward import TransformersForward
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.step_memory import StepMemory
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams
from pipeline.request_rules import write_asked
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_paged_rows import ItemsByReference, Watch, tokens_alone

CPU = torch.device("cpu")
_DRAW = np.random.default_rng(5)
WEIGHT = _DRAW.integers(1, 1 << 20, (tiny.VOCABULARY, 512))
MANY = tuple(range(60, 70))
PARAMS = (
    SamplingParams(max_new_tokens=70),
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=17),
    SamplingParams(max_new_tokens=1),
    SamplingParams(max_new_tokens=33, ignore_eos=True, stop=("x",)),
    SamplingParams(max_new_tokens=50, asked=write_asked({"stop_token_ids": [7, 11, 20]})),
    SamplingParams(max_new_tokens=50, asked=write_asked({"stop_token_ids": list(MANY)})),
)
SLOW = SamplingParams(max_new_tokens=30, asked=write_asked({"min_tokens": 9}))
Answer = tuple[tuple[int, ...], str]


def says_next(ids: Sequence[int]) -> int:
    """After these tokens; about every fourteenth is the end."""
    total = int(WEIGHT[ids, np.arange(len(ids))].sum())
    return tiny.EOS if total % 14 == 0 else (total // 14) % tiny.VOCABULARY


def stops_somewhere(token_ids: Sequence[int], stop: tuple[str, ...], prompt: TokenIds) -> bool:
    return (token_ids[-1] * 7 + len(token_ids)) % 19 == 0


def expected_answer(prompt: Sequence[int], params: SamplingParams) -> Answer:
    from pipeline.request_rules import read_asked

    asked, said = read_asked(params.asked), list[int]()
    ends = {*asked.stop_token_ids, *([] if params.ignore_eos else [tiny.EOS])}
    while True:
        token = says_next([*prompt, *said])
        if len(said) < asked.min_tokens and token in {tiny.EOS, *asked.stop_token_ids}:
            token = 0  # all others are as likely
        said.append(token)
        if token in ends or (params.stop and stops_somewhere(said, params.stop, ())):
            return tuple(said), "stop"
        if len(said) == params.max_new_tokens:
            return tuple(said), "length"


class Summing:
    """The model. `bad`: (prompt's last token, output position) whose logits are no numbers."""

    name = "sums"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        self.calls += 1
        ids, at, slots = (
            x.numpy() for x in (batch.input_ids[0], batch.position_ids[0], batch.slots)
        )
        kept_ids, kept_at = cache.arena[0, 0, 0, :, 0].numpy(), cache.arena[0, 0, 0, :, 1].numpy()
        kept_ids[slots], kept_at[slots] = ids, at
        if batch.copy_from is not None and batch.copy_to is not None:
            cache.arena[..., batch.copy_to, :] = cache.arena[..., batch.copy_from, :]
        total, seen = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        for low, high, begin, end, position, _ in torch.cat(
            [batch.work.large, batch.work.small]
        ).tolist():
            if low == high:
                continue
            stands = np.arange(position, position + end - begin)
            assert (kept_at[begin:end] == stands).all(), (
                "keys stand elsewhere than they were written"
            )
            weights = WEIGHT[kept_ids[begin:end].astype(int), stands]
            sums = np.append(0, np.cumsum(weights))
            count = np.clip(at[low:high] + 1 - position, 0, end - begin)
            total[low:high] += sums[count]
            seen[low:high] += count
        real = slots != cache.capacity
        assert (seen[real] == at[real] + 1).all(), "a query does not see each token before it once"
        token = np.where(total % 14 == 0, tiny.EOS, total // 14 % tiny.VOCABULARY)
        return torch.nn.functional.one_hot(torch.from_numpy(token), tiny.VOCABULARY).float()[keep]


class CallsTwice:
    """In place of a CUDA graph. What is recorded runs once more than it is replayed, as on a card,
    where it is first tried whether it waits."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "choose_recorder", lambda device: CallsTwice())


def summing_engine(forward: Any = None, **limits: Any) -> PrefixEngine:
    loaded, kernel = tiny.load_tiny(), TritonKernel(4, 2, CPU)
    kernel._programs, kernel.items_aimed_at = 16, 8
    backend = Backend(forward or Summing(), kernel, recordable=kernel)
    return PrefixEngine(loaded, EngineSettings(**limits), backend)


def run(engine: Any, plan: Plan, control: RunControl | None = None) -> dict[int, Completion]:
    control = control or RunControl(is_stopped=stops_somewhere)
    every = np.arange(len(plan.sequences))
    return {c.sequence: c for c in engine.generate(plan, every, control)}


def answers(done: dict[int, Completion]) -> dict[int, Answer]:
    return {s: (c.token_ids, c.finish_reason) for s, c in done.items()}


def expected(plan: Plan) -> dict[int, Answer]:
    params = plan.params
    return {
        s: expected_answer(plan.prompt_token_ids(s).tolist(), params[int(plan.sequences.params[s])])
        for s in range(len(plan.sequences))
    }


def random_plan(draw: random.Random, rows: int, kinds: Sequence[SamplingParams] = PARAMS) -> Plan:
    prompts = tiny.random_prompts(draw, rows)
    of_row = [draw.randrange(len(kinds)) for _ in prompts]
    return tiny.plan_of(prompts, tuple(kinds), of_row, draw.choice([1, 4, 16]))


@given(st.integers(0, 1 << 30), st.integers(1, 40), st.sampled_from([None, 1.0, 1.3, 3.0]))
@settings(max_examples=60, deadline=None)
def test_rows_say_the_same_whenever_they_end(seed: int, rows: int, room: float | None) -> None:
    """Ends at random, several in a step, at a budget's last token, by text, by named tokens, with
    room for one row alone (every step preempts) or for all.

    Red with: a row that ended said what was computed behind its end; the token of the step on its
    way lost; a row without slots left wrote on; own keys that did not grow; looking ahead by blocks
    of their own, where the next slot is in the one before; a step fed before it was recorded.
    """
    draw = random.Random(seed)
    plan = random_plan(draw, rows, [*PARAMS, SLOW] if draw.random() < 0.2 else PARAMS)
    limits: dict[str, Any] = {"max_rows": draw.choice([2, 7, 256])}
    if room is not None:
        slots = int(tokens_alone(plan).max() * room)
        limits["kv_budget"] = slots * tiny.load_tiny().shape.kv_bytes_per_token()
    with pytest.MonkeyPatch.context() as patch:
        first, later = draw.choice([(32, 64), (3, 2), (1, 1)])
        patch.setattr(live, "FIRST_NEW_TOKENS", first)
        patch.setattr(scheduler, "BLOCK_TOKENS", later)
        watch = Watch(patch)
        engine = summing_engine(**limits)
        done = run(engine, plan)
        watch.assert_all_released()
    assert answers(done) == expected(plan)
    counters = engine.counters
    assert counters.prefilled_tokens == plan.tree.unique_tokens
    assert counters.prefilled_tokens + counters.cached_tokens == plan.prompt_lengths.sum()
    assert counters.generated_tokens == sum(len(c.token_ids) for c in done.values())
    for c in done.values():
        assert c.timing.queue_s <= c.timing.ttft_s <= c.timing.latency_s


@pytest.mark.parametrize("seed", range(3))
def test_a_real_model_says_the_same_as_the_naive_engine(seed: int) -> None:
    """Through items and slots that were not planned anew for each step."""
    loaded, kernel = tiny.load_tiny(), ItemsByReference(4, 2, CPU)
    backend = Backend(
        TransformersForward(loaded.model, pack_weights=False), kernel, recordable=kernel
    )
    plan = random_plan(random.Random(seed), 14)
    budget = int(tokens_alone(plan).max() * 1.5) * loaded.shape.kv_bytes_per_token()
    plain = answers(run(NaiveEngine(tiny.load_tiny()), plan))
    for kv_budget in (None, budget):
        engine = PrefixEngine(loaded, EngineSettings(kv_budget=kv_budget), backend)
        assert answers(run(engine, plan)) == plain


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host does with the device, in order."""
    seen: list[str] = []
    for owner, name in ((DecodeRunner, "start"), (DecodeRunner, "go_on"), (StepMemory, "read")):
        original = getattr(owner, name)

        def noted(*args: Any, _name: str = name, _original: Any = original) -> Any:
            seen.append(_name)
            return _original(*args)

        monkeypatch.setattr(owner, name, noted)
    return seen


def same_rows(count: int, params: SamplingParams) -> Plan:
    return tiny.plan_of([[9, 8, 7, 10 + i] for i in range(count)], (params,))


def test_the_next_step_is_on_its_way_before_the_last_one_is_read(events: list[str]) -> None:
    """And none is in vain where all ends are known: two strides, after the first token."""
    new = 2 * strides.STEPS + 1
    plan = same_rows(20, SamplingParams(max_new_tokens=new, ignore_eos=True))
    engine = summing_engine()
    assert answers(run(engine, plan)) == expected(plan)
    stride = ["start", *["go_on", "read"] * (strides.STEPS - 1), "read"]
    assert events == stride * 2
    assert engine.counters.num_forwards == new


def test_rows_that_have_all_ended_cost_one_step_more(events: list[str]) -> None:
    params = SamplingParams(max_new_tokens=60, asked=write_asked({"stop_token_ids": [50]}))
    plan = same_rows(6, params)

    class Ends(Summing):
        def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
            at = batch.position_ids[0][keep]
            return torch.nn.functional.one_hot(torch.where(at < 6, 40, 50), 97).float()

    done = run(summing_engine(Ends()), plan)
    assert {c.token_ids for c in done.values()} == {(40, 40, 40, 50)}
    assert events.count("go_on") + events.count("start") == 3 + 1


def test_a_row_that_ends_leaves_the_others_their_stride(events: list[str]) -> None:
    """One of forty; with one of four it is over at once."""
    kinds = (SamplingParams(max_new_tokens=17, ignore_eos=True), SamplingParams(max_new_tokens=5))
    for rows, parts in ((40, 1), (4, 2)):
        events.clear()
        prompts = [[9, 8, 7, 10 + i] for i in range(rows)]
        plan = tiny.plan_of(prompts, kinds, [1, *[0] * (rows - 1)])
        assert answers(run(summing_engine(), plan)) == expected(plan)
        assert events.count("start") == parts


@pytest.mark.fault(
    "NaN logits in one row",
    injected="NaN for one row of nine at its fourth token, in a step that nobody waited for",
    outcome="NonFiniteLogits at that token; the tokens of the neighbours are unchanged",
)
def test_logits_that_are_no_numbers_end_their_row_alone() -> None:
    plan = same_rows(9, SamplingParams(max_new_tokens=12, ignore_eos=True))

    class Poisoned(Summing):
        def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
            logits = super().__call__(batch, cache, keep)
            if batch.position_ids[0][0] == 4 + 2 and len(logits) == 12:  # a bucket of nine rows
                logits[4] = float("nan")
            return logits

    done, right = run(summing_engine(Poisoned()), plan), expected(plan)
    assert done[4].error_type == "NonFiniteLogits" and "output token 4" in str(
        done[4].error_message
    )
    assert answers({s: c for s, c in done.items() if s != 4}) == {
        s: answer for s, answer in right.items() if s != 4
    }


@pytest.mark.fault(
    "out of memory in decode",
    injected="no memory for the third step of a stride, while the second is on its way",
    outcome="the stride is over; what was said stays, and the next one halves its rows",
)
@pytest.mark.parametrize("at", [2, 3, 5])
def test_memory_that_ends_within_a_stride_loses_no_token(at: int) -> None:
    plan = same_rows(12, SamplingParams(max_new_tokens=40, ignore_eos=True))

    class Full(Summing):
        def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
            logits = super().__call__(batch, cache, keep)
            if self.calls > at and len(batch.slots) > 8 and len(keep) == len(batch.slots):
                raise torch.OutOfMemoryError("planted")
            return logits

    engine = summing_engine(Full())
    assert answers(run(engine, plan)) == expected(plan)
    assert engine.counters.memory_retries
    assert engine.counters.generated_tokens == sum(len(a) for a, _ in expected(plan).values())


def test_a_row_that_needs_its_token_at_once_makes_steps_one_by_one(events: list[str]) -> None:
    """And strides begin when it has left."""
    kinds = (SamplingParams(max_new_tokens=40, ignore_eos=True), SLOW)
    prompts = [[9, 8, 7, 10 + i] for i in range(10)]
    plan = tiny.plan_of(prompts, kinds, [1, *[0] * 9])
    right = expected(plan)
    assert answers(run(summing_engine(), plan)) == right
    alone = len(right[0][0]) - 1
    assert events[: 2 * alone] == ["start", "read"] * alone
    assert events[2 * alone :].count("go_on") > 10


def test_a_caller_who_sees_each_tokens_logits_gets_steps_one_by_one(events: list[str]) -> None:
    plan = same_rows(5, SamplingParams(max_new_tokens=9, ignore_eos=True))
    hooks, seen = tiny.watch_logits()
    every = np.arange(len(plan.sequences))
    done = {c.sequence: c for c in summing_engine().generate(plan, every, RunControl(), hooks)}
    assert answers(done) == expected(plan) and len(seen) == 5 * 9
    assert "go_on" not in events
