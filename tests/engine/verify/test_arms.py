"""Arms on tiny models: sound ones lie close together, spoilt engines say other things."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.arms import (
    ARMS,
    ForcedRow,
    compare_arms,
    forced_logits,
    same_bits_alone,
)
from pipeline.engine.verify.planted_faults import FAULTS, Fault, FaultyForward, write_with_fault
from pipeline.settings import EngineSettings
from tests.engine.tiny import (
    FAMILIES,
    GREEDY,
    SAMPLED,
    VOCABULARY,
    load_tiny,
    random_prompts,
    with_backend,
)
from tests.sweeps import diagonal

SHARED = [5 + (7 * i) % 80 for i in range(40)]
PROMPTS = [[*SHARED, *own] for own in ([9, 8], [50, 51, 52], [60], [33, 34, 9, 70])]


def forced_rows() -> list[ForcedRow]:
    """Whatever was said: tokens that no model chose, of 1 to 7, greedy and sampled."""
    draw = random.Random(3)
    return [
        ForcedRow(
            prompt,
            [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 8))],
            SAMPLED if row % 3 else GREEDY,
            row,
        )
        for row, prompt in enumerate(random_prompts(draw, 12))
    ]


@pytest.mark.parametrize(("family", "budget"), diagonal(FAMILIES, (None, 90_000)))
def test_every_arm_says_what_full_prefill_says(family: str, budget: int | None) -> None:
    """Also where rows are preempted and come again, and after tokens that end an answer."""
    engine = PrefixEngine(load_tiny(family), EngineSettings(kv_budget=budget, max_rows=5))
    arms = dict(compare_arms(engine, forced_rows()))
    assert tuple(arms) == ARMS and engine.settings.max_rows == 5
    for name, rows in arms.items():
        assert [len(row.kl) for row in rows] == [len(row.output) for row in forced_rows()]
        worst = max(float(row.gap.max()) for row in rows)
        assert worst == 0.0 if name == "again" else worst < 1e-2, name
        assert not any(row.differs.any() for row in rows), name
        assert max(float(row.kl.max()) for row in rows) < 1e-6


def test_the_logits_are_those_of_the_given_tokens_with_and_without_reuse() -> None:
    loaded, rows = load_tiny(), forced_rows()
    engine, naive = PrefixEngine(loaded, EngineSettings()), NaiveEngine(loaded)
    for share in (False, True):
        for row, logits in zip(rows, forced_logits(engine, rows, share), strict=True):
            expected = naive.forced_logits(row.prompt, row.output)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
        saved = sum(len(row.prompt) for row in rows) - engine.counters.prefilled_tokens
        assert (saved > 100) if share else saved == 0


def test_an_arm_that_is_wrong_is_far_away() -> None:
    """Positions off by one behind a place of the shared prefix: seen in every row."""
    engine = PrefixEngine(load_tiny(), EngineSettings())
    rows = [ForcedRow(prompt, [4, 5, 6], GREEDY, 0) for prompt in PROMPTS]
    spoilt = FaultyForward(engine.backend.forward, "position", 20)
    arms = dict(compare_arms(with_backend(engine, forward=spoilt), rows))
    assert all(row.kl.max() > 1e-3 for row in arms["product"])


def test_strict_mode_keeps_the_bits_of_a_row_and_the_default_does_not() -> None:
    rows = forced_rows()
    for settings in (EngineSettings(fidelity="strict"), EngineSettings()):
        engine = PrefixEngine(load_tiny(), settings)
        assert all(same_bits_alone(engine, rows)) == (settings.fidelity == "strict")


@pytest.mark.parametrize(("fault", "dtype"), diagonal(FAULTS, (torch.float32, torch.bfloat16)))
def test_a_planted_fault_changes_answers(fault: Fault, dtype: torch.dtype) -> None:
    """At some place; without one, answers are those of the engine, and it is whole afterwards."""
    engine = PrefixEngine(load_tiny(dtype=dtype), EngineSettings())
    clean = [done.token_ids for done in write_with_fault(engine, PROMPTS, 8, None, 0)]
    assert all(1 <= len(answer) <= 8 for answer in clean)
    spoilt = [
        [done.token_ids for done in write_with_fault(engine, PROMPTS, 8, fault, at)]
        for at in (3, 20, 39)
    ]
    assert any(answers != clean for answers in spoilt)
    again = [done.token_ids for done in write_with_fault(engine, PROMPTS, 8, None, 0)]
    assert again == clean


def test_one_bit_is_flipped_in_one_value_only() -> None:
    engine = PrefixEngine(load_tiny(), EngineSettings())
    before: list[torch.Tensor] = []

    def arena_after(fault: Fault | None) -> np.ndarray:
        real = engine.backend.forward

        def forward(batch, cache, keep):  # type: ignore[no-untyped-def]
            before.append(cache.arena)
            return real(batch, cache, keep)

        forward.name = "watched"  # type: ignore[attr-defined]
        write_with_fault(with_backend(engine, forward=forward), PROMPTS[:1], 1, fault, 5)
        return before[-1].numpy().view(np.int32).copy()

    clean, spoilt = arena_after(None), arena_after("bit flip")
    written = (slice(None), slice(None), slice(None), slice(0, len(PROMPTS[0])))
    different = np.argwhere(clean[written] != spoilt[written])
    assert len(different) == 1
    place = tuple(different[0])
    assert clean[written][place] ^ spoilt[written][place] == 1 << 30
