"""How many kernels a layer starts, counted where there is no card, for every fused family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.gpu.roofline import FUSED, UNFUSED
from pipeline.engine import decoder
from pipeline.engine.merged_linear import MergedLinear
from pipeline.engine.triton_forward import TritonForward
from tests.engine import families
from tests.engine.families import FAMILIES, Family

pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")

from benchmarks.gpu.launches import Counts, counted, plainly, small_llama  # noqa: E402

KNOWN = [family for family in FAMILIES if family.model_type in decoder.FAMILIES]
MOST_KERNELS = 12


def with_layers(family: Family, layers: int) -> Family:
    """The same with as many layers, all of one kind, so that there is one table of turns."""
    kinds = family.options.get("layer_types")
    fewer = {} if kinds is None else {"layer_types": kinds[:1] * layers}
    return replace(family, options=family.options | {"num_hidden_layers": layers} | fewer)


def builder(family: Family) -> Callable[[int], PreTrainedModel]:
    return lambda layers: families.load(with_layers(family, layers), torch.bfloat16).model


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.id)
def test_a_layer_starts_at_most_twelve_kernels(family: Family) -> None:
    """Counted where torch computes and where Triton programs start; seen red with a copy more."""
    counts = Counts.of(builder(family), TritonForward)
    assert counts.layer.total() <= MOST_KERNELS, counts.layer
    assert counts.layer["triton join"] == 2 and counts.layer["triton merge_partials"] == 1


def test_the_count_of_a_llama_is_that_of_the_model_of_a_step() -> None:
    """And transformers' own code starts nearly four times as many."""
    fused, plain = (Counts.of(small_llama, run) for run in (TritonForward, plainly))
    assert fused.layer.total() == FUSED.kernels == 11
    assert plain.layer.total() == UNFUSED.kernels == 42
    assert fused.rest.total() <= 13, fused.rest


def test_an_operation_more_in_a_layer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = MergedLinear.__call__
    monkeypatch.setattr(MergedLinear, "__call__", lambda self, x: merged(self, x) * 1.0)
    counts = Counts.of(small_llama, TritonForward)
    assert counts.layer.total() == FUSED.kernels + 4


def test_views_and_new_memory_are_no_kernels() -> None:
    x = torch.randn(4, 6)
    with counted() as kernels:
        torch.empty_like(x.view(2, 12).t()[1:].unsqueeze(0))
        torch.split(x.flatten(), 2)
        x.new_empty(3)
    assert not kernels
    with counted() as kernels:
        x.t().contiguous().add_(1.0)
        torch.cat([x, x])
    assert kernels == {"clone": 1, "add_": 1, "cat": 1}
