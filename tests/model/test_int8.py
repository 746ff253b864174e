"""Linear layers of int8 against the exact sums of their own whole numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ModelError, UsageError
from pipeline.model.int8 import Int8Linear, hold_in_int8, holds_int8, quantize
from pipeline.model.model import load_model
from pipeline.model.weights import check_int8
from pipeline.settings import JobSettings, ModelSettings
from tests.engine import tiny


def exact(layer: Int8Linear, x: Tensor) -> Tensor:
    """By sums of whole numbers in float64."""
    q, scale = quantize(x)
    y = (q.double() @ layer.weight.double().T) * scale.double() * layer.scale.double()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [None, torch.randn(80)], ids=["plain", "bias"])
def test_a_product_is_the_exact_sum_of_its_whole_numbers(bias: Tensor | None) -> None:
    torch.manual_seed(0)
    layer, x = Int8Linear.of(torch.randn(80, 2048), bias), torch.randn(7, 2048)
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-6, atol=1e-5)


def test_rounding_is_within_half_a_step_of_each_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    q, scale = quantize(x)
    assert q.abs().amax(1).eq(127).all()
    assert ((q * scale - x).abs() <= scale * 0.5001).all()


def test_a_row_of_zeros_gives_the_bias_and_one_that_is_not_finite_nan() -> None:
    layer = Int8Linear.of(torch.randn(16, 32), torch.ones(16))
    x = torch.randn(4, 32)
    x[0], x[1, 3], x[2, 0] = 0.0, torch.nan, torch.inf
    y = layer(x)
    assert y[0].tolist() == [1.0] * 16
    assert y[1:3].isnan().all() and y[3].isfinite().all()


def test_any_number_of_dimensions_and_the_dtype_of_the_input() -> None:
    layer, x = Int8Linear.of(torch.randn(16, 32), None), torch.randn(2, 3, 32).bfloat16()
    assert layer(x).shape == (2, 3, 16) and layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x)[1, 2], layer(x[1, 2][None])[0])
    assert layer(x[:, :0]).shape == (2, 0, 16)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_is_held_in_int8_but_the_output_layer(family: str) -> None:
    model = tiny.build_model(family).eval()
    ids = torch.randint(0, tiny.VOCABULARY, (1, 20))
    before = model(ids).logits
    hold_in_int8(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Linear) == 1 and Conv1D not in kinds
    assert type(model.get_output_embeddings()) is nn.Linear
    assert holds_int8(model) and model.dtype == torch.float32
    after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05


def test_bytes_of_linear_layers_are_a_quarter_of_float32() -> None:
    model = tiny.build_model("llama")
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    linear.remove(model.get_output_embeddings())
    before = sum(m.weight.nbytes for m in linear)
    hold_in_int8(model)
    after = sum(m.weight.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    assert after * 4 == before


def test_a_model_of_experts_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "num_local_experts": 4, "vocab_size": 97}'
    )
    with pytest.raises(ModelError, match="experts"):
        load_model(ModelSettings(model=str(tmp_path), weights="int8"))
    check_int8(ModelSettings(model=str(tmp_path)))


@pytest.mark.parametrize("engine", ["vllm", "echo"])
def test_an_engine_without_int8_is_refused_by_name(engine: str) -> None:
    with pytest.raises(UsageError, match=f"weights int8 .* not for {engine}"):
        JobSettings.from_flat({"model": "any", "engine": engine, "weights": "int8"})


def test_another_device_than_a_cpu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 97}')
    with pytest.raises(UsageError, match="--weights int8 is for CPUs"):
        check_int8(ModelSettings(model=str(tmp_path), weights="int8", device="meta"))
