"""Several samples of a row: each as a row of its own would be, and no prompt token more."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.plan.plan import Plan, build_plan, noise_key
from pipeline.plan.samples import Samples
from pipeline.plan.subplan import carve
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_prefix_engine import run

SAMPLED = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3)
MANY = replace(SAMPLED, n=16)


def plan_of(prompts: list[list[int]], params: SamplingParams, min_prefix_tokens: int = 4) -> Plan:
    return tiny.plan_of(prompts, (params, tiny.GREEDY), None, min_prefix_tokens)


def test_the_first_sample_s_key_is_the_row_s_own_and_no_two_are_equal() -> None:
    keys = {noise_key(seed, name, n) for seed in (0, 1) for name in "ab" for n in range(300)}
    assert len(keys) == 1200
    # What rows drew before samples were known, and what they must go on drawing.
    assert noise_key(0, "r0") == 3148343573285981900


@pytest.mark.parametrize("min_prefix_tokens", [1, 4, 1000])
@pytest.mark.parametrize("prompts", [tiny.random_prompts(random.Random(2), 6), [[5] * 40], [[9]]])
def test_sixteen_samples_compute_no_more_prompt_tokens_than_one(
    prompts: list[list[int]], min_prefix_tokens: int
) -> None:
    one, many = (plan_of(prompts, params, min_prefix_tokens) for params in (SAMPLED, MANY))
    assert many.tree.unique_tokens == one.tree.unique_tokens
    assert len(many.sequences) == 16 * len(one.sequences)
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    done = run(engine, many)
    assert engine.counters.prefilled_tokens == one.tree.unique_tokens
    cached = sum(found.cached_tokens for found in done.values())
    total = 16 * int(one.table.lengths.sum())
    assert total - cached == engine.counters.prefilled_tokens
    alone = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), one)
    samples = Samples(many)
    for row in range(len(prompts)):
        first, own = int(many.sequence_of_row[row]), int(one.sequence_of_row[row])
        assert samples.count(first) == 16 and samples.first(first + 15) == first
        assert done[first].token_ids == alone[own].token_ids
        answers = {done[first + n].token_ids for n in range(16)}
        assert len(answers) > 4


@pytest.mark.parametrize("max_rows", [1, 5, 256])
def test_each_text_is_that_of_a_row_with_the_same_key(max_rows: int) -> None:
    prompts = tiny.random_prompts(random.Random(8), 5)
    many = plan_of(prompts, replace(SAMPLED, n=7))
    order = many.sequences.row
    apart = tiny.plan_of([prompts[row] for row in order.tolist()], (SAMPLED,))
    at = apart.sequence_of_row[np.arange(len(order))]
    keys = np.empty_like(many.sequences.noise_key)
    keys[at] = many.sequences.noise_key
    apart = replace(apart, sequences=replace(apart.sequences, noise_key=keys))
    settings = EngineSettings(max_rows=max_rows)
    together = run(PrefixEngine(tiny.load_tiny(), settings), many)
    rows = run(PrefixEngine(tiny.load_tiny(), settings), apart)
    for sequence, row in enumerate(at.tolist()):
        assert together[sequence].token_ids == rows[row].token_ids
    naive = run(NaiveEngine(tiny.load_tiny()), many)
    assert {s: c.token_ids for s, c in naive.items()} == {
        s: c.token_ids for s, c in together.items()
    }


def test_a_piece_of_a_row_s_samples_is_a_plan_of_its_own() -> None:
    plan = plan_of([[5, 6, 7, 8, 9]] * 2, MANY)
    whole = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), plan)
    for some in (np.arange(3, 20), np.array([31]), np.array([0, 15, 16])):
        piece = carve(plan, some)
        done = run(PrefixEngine(tiny.load_tiny(), EngineSettings()), piece)
        for place, sequence in enumerate(some.tolist()):
            assert done[place].token_ids == whole[sequence].token_ids


def test_rows_of_one_sample_are_beside_rows_of_several() -> None:
    table = TokenTable.from_lists([[5, 6], [5, 6], [5, 6, 7], [], [8]], tiny.VOCABULARY)
    params = (tiny.GREEDY, replace(SAMPLED, n=3), SAMPLED)
    chosen = np.array([0, 1, 2, 1, 0])
    plan = build_plan(table, ["a", "b", "c", "d", "e"], params, chosen)
    samples = Samples(plan)
    assert all(p.n == 1 for p in plan.params)
    for rows in ([0, 1, 2, 4], [1], [2, 3], []):
        wanted = np.array(rows, np.int64)
        found = samples.sequences(wanted).tolist()
        expected = [s for s in range(6) if int(plan.sequences.row[s]) in rows]
        assert found == expected
