"""Bits that flip in the KV of shared prefixes while rows read it: noticed, and computed again."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import kv_guard, prefix_engine
from pipeline.engine.base import RunControl
from pipeline.engine.forward import Forward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.kv_guard import CorruptKVError, KVGuard
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.spans import SharedSpan
from pipeline.errors import EngineError
from pipeline.plan.plan import Plan
from pipeline.settings import EngineSettings
from tests.engine.tiny import (
    LONGER,
    SAMPLED,
    load_tiny,
    plan_of,
    random_prompts,
    with_backend,
)

SHARED = [5 + (7 * i) % 80 for i in range(40)]


class FlippingForward:
    """Another forward; before its calls `at` another bit in slot 7 of the arena flips."""

    def __init__(self, forward: Forward, at: set[int]) -> None:
        self.name = forward.name
        self.calls = 0
        self.flips = 0
        self._forward = forward
        self._at = at

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        if self.calls in self._at:
            cache.arena[1, 1, 0, 7, 2:3].view(torch.int32).bitwise_xor_(1 << (28 - self.flips % 20))
            self.flips += 1
        self.calls += 1
        return self._forward(batch, cache, keep)


def answers(engine: PrefixEngine, plan: Plan) -> dict[int, tuple[int, ...]]:
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), RunControl()))
    assert sorted(c.sequence for c in done) == list(range(len(plan.sequences)))
    cached = sum(completion.cached_tokens for completion in done)
    assert cached == engine.counters.cached_tokens
    assert cached + engine.counters.prefilled_tokens == int(plan.prompt_lengths.sum())
    return {completion.sequence: completion.token_ids for completion in done}


def flipping(engine: PrefixEngine, at: set[int]) -> PrefixEngine:
    forward = FlippingForward(engine.backend.forward, at)
    return with_backend(engine, forward=forward)


def engine_of(max_rows: int = 256, budget: int | None = None) -> PrefixEngine:
    return PrefixEngine(load_tiny(), EngineSettings(max_rows=max_rows, kv_budget=budget))


@pytest.mark.fault(
    "KV bit flip in a shared prefix",
    injected="one bit of a value, at several moments of a job",
    outcome="noticed, computed again; no answer changes",
)
@pytest.mark.parametrize("max_rows", [3, 256])
@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_flipped_bit_changes_no_answer(
    max_rows: int, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red without the guard, see the next test. Checks at every step, or only at the end."""
    prompts = [[*SHARED, 4 + own, 9, own % 7 + 4] for own in range(12)]
    plan = plan_of(prompts, (LONGER, SAMPLED), [own % 2 for own in range(12)])
    expected = answers(engine_of(max_rows), plan)
    for interval in (0.0, 1e9):
        monkeypatch.setattr(kv_guard, "_LEAST_INTERVAL_S", interval)
        engine = flipping(engine_of(max_rows), {at})
        assert answers(engine, plan) == expected
        assert engine.counters.kv_faults == 1 and engine.counters.recomputed_tokens > 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_without_the_guard_the_bit_changes_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would be blind."""
    plan = plan_of([[*SHARED, 4 + own, 9] for own in range(12)], (LONGER,))
    expected = answers(engine_of(), plan)
    monkeypatch.setattr(KVGuard, "watch", lambda self, span: None)
    assert answers(flipping(engine_of(), {1}), plan) != expected


def test_random_trees_under_a_small_budget_with_three_flips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are preempted, nodes evicted, ranges moved; three faults in one job are survived."""
    monkeypatch.setattr(kv_guard, "_LEAST_INTERVAL_S", 0.0)
    plan = plan_of(random_prompts(random.Random(5)), (LONGER,))
    expected = answers(engine_of(6), plan)
    engine = flipping(engine_of(6, 150_000), {3, 30, 70})
    assert answers(engine, plan) == expected
    assert engine.counters.kv_faults >= 1


def test_memory_that_is_never_sound_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_guard, "_LEAST_INTERVAL_S", 0.0)
    plan = plan_of([[*SHARED, 4 + own, 9] for own in range(12)], (LONGER,))
    engine = flipping(engine_of(), set(range(1, 10_000)))
    with pytest.raises(EngineError, match="memory is not sound"):
        list(engine.generate(plan, np.arange(len(plan.sequences)), RunControl()))
    assert engine.counters.kv_faults == prefix_engine._MOST_KV_FAULTS + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 6, 3])
def test_every_bit_of_a_range_counts_and_no_other(dtype: torch.dtype, head_dim: int) -> None:
    cache = KVCache((2, 2, head_dim), 10, torch.zeros(1, dtype=dtype))
    cache.arena.normal_()
    guard = KVGuard(cache)
    span = SharedSpan(
        key=0, ids=np.zeros(4, np.uint16), sequence=0, length=4,
        num_sequences=2, unfinished=2, unread=0,
    )  # fmt: skip
    kv_range = cache.acquire(4, from_left=True)
    assert kv_range is not None
    span.kv = kv_range
    kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
    bits = cache.arena.view(kind)
    for bit in (0, 7, 8 * dtype.itemsize - 2):
        guard.watch(span)
        bits[0, 0, 1, 4, 0] ^= 1 << bit  # behind the range
        guard.release(span)
        guard.watch(span)
        bits[1, 0, 1, 3, head_dim - 1] ^= 1 << bit
        with pytest.raises(CorruptKVError):
            guard.release(span)
