"""The compiled layers against the same arithmetic in plain torch, and the engine in int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from pipeline.engine import blocked_linear
from pipeline.engine.blocked_linear import BlockedGate, BlockedLinear
from pipeline.engine.kernels import native
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.self_test import self_test
from pipeline.engine.verify.strict_probe import strict_probe
from pipeline.model.int8 import Int8Linear, hold_in_int8
from pipeline.model.model import LoadedModel
from pipeline.settings import EngineSettings
from tests.engine import families
from tests.engine.test_strict import bits, bits_alone, forest, num_unequal

SIZES = [(16, 16), (64, 64), (80, 48), (97, 32), (208, 576), (960, 2560)]
TOKENS = [0, 1, 2, 5, 16, 17, 48, 49, 130]


def layer_of(outputs: int, inputs: int, bias: bool = False) -> Int8Linear:
    weight = torch.randn(outputs, inputs)
    return Int8Linear.of(weight, torch.randn(outputs) if bias else None)


needs_kernel = pytest.mark.skipif(
    not blocked_linear.suits(layer_of(16, 16)), reason="no compiled int8 kernel on this machine"
)
needs_floats = pytest.mark.skipif(
    not blocked_linear.suits(nn.Linear(16, 16)), reason="no compiled kernel on this machine"
)


@pytest.fixture(params=["bfloat16", "half", "widened"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bfloat16 is multiplied, whichever is fastest here."""
    if native.why_unavailable() is not None or request.param not in native.ways_of_bfloat16():
        pytest.skip("this CPU has no such product of bfloat16")
    monkeypatch.setattr(native, "way_of_bfloat16", lambda: request.param)
    return str(request.param)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_gives_the_bits_of_plain_torch(size: tuple[int, int], dtype: Any) -> None:
    torch.manual_seed(0)
    layer = layer_of(*size)
    packed = BlockedLinear(layer)
    for tokens in TOKENS:
        x = torch.randn(tokens, size[1]).to(dtype)
        assert torch.equal(packed(x), layer(x)), tokens


@needs_kernel
def test_layers_side_by_side_are_the_layers_alone() -> None:
    torch.manual_seed(0)
    layers = [layer_of(n, 64, bias=True) for n in (96, 32, 32)]
    x = torch.randn(33, 64).bfloat16()
    expected = torch.cat([layer(x.float()) for layer in layers], 1)
    torch.testing.assert_close(BlockedLinear(*layers)(x.float()), expected)


@needs_kernel
@pytest.mark.parametrize("outputs", [64, 80, 1536])
def test_what_follows_a_layer_is_rounded_once(outputs: int) -> None:
    torch.manual_seed(0)
    layer, up = layer_of(outputs, 128), layer_of(outputs, 128, bias=True)
    x, other = torch.randn(50, 128), torch.randn(50, outputs)
    torch.testing.assert_close(BlockedLinear(layer).plus(x, other), layer(x) + other)
    gated = silu(layer(x)) * up(x)
    torch.testing.assert_close(BlockedGate(layer, up)(x), gated, rtol=1e-5, atol=1e-5)


def check_products(
    size: tuple[int, int], bias: bool, dtype: torch.dtype, rtol: float, per_term: float = 0.0
) -> None:
    """The exact product, what follows it fused, rounded once.

    `per_term`: what may be lost beside that, as a share of the sum of the terms' sizes.
    """
    torch.manual_seed(0)
    layer = nn.Linear(size[1], size[0], bias=bias, dtype=dtype).requires_grad_(False)
    packed, exact = BlockedLinear(layer), copy.deepcopy(layer).double()
    gated, up = BlockedGate(layer, layer), exact
    for tokens in TOKENS:
        x, other = (
            torch.randn(tokens, size[1], dtype=dtype),
            torch.randn(tokens, size[0], dtype=dtype),
        )
        y = up(x.double())
        lost = per_term * (x.double().abs() @ exact.weight.abs().T)
        pairs = (
            (packed(x), y, lost),
            (packed.plus(x, other), y + other, lost),
            (gated(x), silu(y) * y, lost * (1 + 2 * y.abs())),
        )
        for found, expected, also in pairs:
            assert ((found - expected).abs() <= rtol * expected.abs() + 1e-5 + also).all()


HALVES_LOSE = 2**-8
"""Of the sizes of the terms, in sums of 32 products of half precision: at most 2^-7 of one."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_the_exact_product_rounded_once(
    size: tuple[int, int], bias: bool, way: str
) -> None:
    per_term = HALVES_LOSE if way == "half" else 0.0
    check_products(size, bias, torch.bfloat16, rtol=2**-8, per_term=per_term)


def test_numbers_of_bfloat16_may_be_of_any_size(way: str) -> None:
    """Tokens and outputs each of another size or 0, one input a thousand times the others."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 80, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight *= torch.logspace(-12, 12, 80).unsqueeze(1)
    layer.weight[7] = 0
    x = torch.randn(40, 256) * torch.logspace(-18, 18, 40).unsqueeze(1)
    x[:, 3] *= 1000
    x[5] = 0
    x = x.bfloat16()
    y = x.double() @ layer.weight.double().T
    terms = x.double().abs() @ layer.weight.double().abs().T
    per_term = HALVES_LOSE if way == "half" else 2**-20
    lost = (BlockedLinear(layer)(x) - y).abs()
    assert (lost <= 2**-8 * y.abs() + per_term * terms + 1e-36).all()


def test_a_token_of_bfloat16_that_is_not_finite_spoils_no_other(way: str) -> None:
    layer = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    packed, x = BlockedLinear(layer), torch.randn(20, 64, dtype=torch.bfloat16)
    clean = packed(x)
    x[3, 5], x[7, 63], x[9, 0] = torch.nan, torch.inf, -torch.inf
    y = packed(x)
    assert not y[[3, 7, 9]].isfinite().any(), way
    others = [i for i in range(20) if i not in (3, 7, 9)]
    assert torch.equal(y[others], clean[others])


@needs_floats
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_the_product_of_float32(size: tuple[int, int], bias: bool) -> None:
    check_products(size, bias, torch.float32, rtol=1e-4)


def test_bfloat16_layers_side_by_side_are_the_layers_alone(way: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, n, dtype=torch.bfloat16).requires_grad_(False) for n in (96, 32, 32)]
    x = torch.randn(3, 11, 64, dtype=torch.bfloat16)
    y, expected = BlockedLinear(*layers)(x), torch.cat([layer(x) for layer in layers], -1)
    assert torch.equal(y, torch.cat([BlockedLinear(layer)(x) for layer in layers], -1))
    atol = 4e-3 if way == "half" else 1e-3
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=atol)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_a_token_has_the_same_bits_whatever_stands_beside_it(dtype: torch.dtype) -> None:
    check_tokens_apart(dtype)


@pytest.mark.parametrize("way", ["half", "widened"], indirect=True)
@pytest.mark.usefixtures("way")
def test_a_token_of_bfloat16_has_the_same_bits_whatever_stands_beside_it() -> None:
    check_tokens_apart(torch.bfloat16)


def check_tokens_apart(dtype: torch.dtype) -> None:
    """Of tokens in other numbers and places."""
    torch.manual_seed(0)
    plain = nn.Linear(2048, 960, dtype=dtype if dtype.is_floating_point else None)
    packed = BlockedLinear(
        layer_of(960, 2048) if dtype == torch.int8 else plain.requires_grad_(False)
    )
    x = torch.randn(200, 2048).to(plain.weight.dtype)
    whole = packed(x)
    for low, high in ((0, 1), (3, 20), (47, 49), (100, 200)):
        assert torch.equal(packed(x[low:high]), whole[low:high])


@needs_kernel
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other() -> None:
    packed, x = BlockedLinear(layer_of(64, 64)), torch.randn(20, 64)
    clean = packed(x)
    x[3, 5], x[7, 63], x[9, 0] = torch.nan, torch.inf, -torch.inf
    y = packed(x)
    assert y[[3, 7, 9]].isnan().all()
    others = [i for i in range(20) if i not in (3, 7, 9)]
    assert torch.equal(y[others], clean[others])


def loaded_in_int8(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    loaded = families.load(next(f for f in families.FAMILIES if f.id == name))
    hold_in_int8(loaded.model.to(dtype))
    return loaded


ANY = ("llama, grouped heads", "gpt2, learned positions")


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ANY)
def test_the_engine_says_what_the_model_with_the_same_weights_says(name: str, kernels: str) -> None:
    settings = EngineSettings.model_validate({"kernels": kernels})
    assert self_test(PrefixEngine(loaded_in_int8(name), settings)) < 1e-3


@pytest.mark.parametrize("name", ANY)
def test_strict_mode_keeps_every_bit_in_int8(name: str) -> None:
    settings = EngineSettings(fidelity="strict")
    engine, plan = PrefixEngine(loaded_in_int8(name), settings), forest(0)
    assert strict_probe(engine) > 0
    alone = bits_alone(engine, plan)
    if name.startswith("llama") and blocked_linear.suits(layer_of(16, 16)):
        assert engine.backend.forward.name == "native", "sums of whole numbers need no tiles"
    for rows in (1, 7):
        limited = PrefixEngine(engine.loaded, settings.model_copy(update={"max_rows": rows}))
        assert num_unequal(bits(limited, plan), alone) == 0
