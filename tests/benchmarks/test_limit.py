"""The counted work against numbers counted by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.limit import Dimensions, Work, count_work, gemm_rates
from benchmarks.prompts import distinct_prompts, plan_prompts, shared_prompts
from benchmarks.shapes import SHAPES

SMALL = Dimensions(hidden=8, intermediate=16, layers=2, heads=4, kv_heads=2, vocabulary=10)


def test_two_rows_that_share_three_tokens() -> None:
    """Tree: 1 2 3, below it 4 and 5 6; two new tokens, of which one is fed to each row.

    Pairs: 1+2+3 on the trunk; 4+5 for row one (its own, then the new one); 4+5+6 for row two.
    """
    work = count_work([[1, 2, 3, 4], [1, 2, 3, 5, 6]], new_tokens=2)
    assert work == Work(prefilled_tokens=6, decoded_tokens=2, chosen_tokens=4, pairs=6 + 9 + 15)


def test_nothing_shared() -> None:
    """Row one: 1+..+5 pairs, row two: 1+..+6."""
    work = count_work([[1, 2, 3, 4], [1, 2, 3, 5, 6]], new_tokens=2, share=False)
    assert work == Work(prefilled_tokens=9, decoded_tokens=2, chosen_tokens=4, pairs=15 + 21)


def test_equal_prompts_are_answered_once_and_a_prefix_of_another_costs_no_prefill() -> None:
    work = count_work([[1, 2], [1, 2], [1, 2, 3]], new_tokens=1)
    assert work == Work(prefilled_tokens=3, decoded_tokens=0, chosen_tokens=2, pairs=1 + 2 + 3)


def test_weights_and_flop_of_a_small_model() -> None:
    """A layer: q and o 8x8, k and v 8x4, three of 8x16 = 128 + 64 + 384; two layers; head 8x10."""
    assert SMALL.body_weights == 2 * 576
    assert SMALL.head_weights == 80
    assert SMALL.flop_per_pair == 4 * 4 * 2 * 2  # heads, their width, layers
    work = Work(prefilled_tokens=3, decoded_tokens=1, chosen_tokens=2, pairs=10)
    unasked = 2 * 448  # two tokens do without o and the three of 8x16 in the last layer
    assert work.flop(SMALL) == 2 * (1152 * 4 - unasked) + 2 * 80 * 2 + 64 * 10


def test_the_main_job_at_135m() -> None:
    """64 x (1,024 + 32) with 32 new: 3,072 tokens prefilled and 1,984 fed again."""
    model = Dimensions.of(SHAPES["135M"])
    assert model.body_weights == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    work = count_work(shared_prompts(64, 1024, 32, 49152), new_tokens=32)
    trunk, row = 1024 * 1025 // 2, 63 * 1024 + 63 * 64 // 2
    assert work == Work(1024 + 64 * 32, 64 * 31, 64 * 32, trunk + 64 * row)


@pytest.mark.parametrize("shared", [0, 5])
def test_unique_tokens_are_those_of_the_plan(shared: int) -> None:
    prompts = shared_prompts(7, shared, 3, 50) + distinct_prompts(5, (1, 9), 3)
    tree = plan_prompts(prompts, 50, 4).tree
    assert count_work(prompts, new_tokens=4).prefilled_tokens == tree.unique_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_measured_both_ways(dtype: torch.dtype) -> None:
    rates = gemm_rates(SMALL, dtype)
    assert all(rate > 0 for rate in rates.values())
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert set(rates) == {"matmul", "prepacked"}
