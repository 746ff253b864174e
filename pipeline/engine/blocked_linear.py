"""Linear layers by the compiled kernel, with the step that follows them fused.

It takes weights in blocks of 64 outputs, in which the inputs that fill 32 bits lie side by side:
n = 1 of float32, 2 of bfloat16, 4 of int8; but 1 of half precision (`linear.cpp`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.kernels import native
from pipeline.model.int8 import Int8Linear

_WIDE = 64
_LANES = 16
_ZERO = 128
_HALF_BITS = 5  # numbers of half precision are below 2^5 (`halves.h`)


def suits(linear: Any) -> bool:
    """Whether the kernel is there, which not every CPU has, and knows a layer of this size."""
    if linear.weight.shape[1] % _LANES or native.why_unavailable() is not None:
        return False
    return _operator(linear) is not None


class BlockedLinear:
    """y = x W^T + b. x [..., in], y [..., out] of the weights' dtype; of int8 either float."""

    def __init__(self, *linears: nn.Linear | Int8Linear) -> None:
        """The outputs of `linears`, side by side."""
        self._operator = _operator(linears[0])
        self._outputs = sum(len(linear.weight) for linear in linears)
        self._blocks = _pack(*linears)

    def __call__(self, x: Tensor) -> Tensor:
        """y."""
        return self._apply(x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, rounded once."""
        return self._apply(x, other)

    def _apply(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        y: Tensor = self._operator(rows, *self._blocks, self._outputs, other, False)
        return y.view(*x.shape[:-1], self._outputs)


class BlockedGate:
    """silu(gate(x)) * up(x), rounded once. x [N, in]; [N, out]."""

    def __init__(self, gate: nn.Linear | Int8Linear, up: nn.Linear | Int8Linear) -> None:
        self._operator = _operator(gate)
        self._outputs = len(gate.weight)
        pairs = zip(_pack(gate), _pack(up), strict=True)
        self._blocks = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]  # in turns

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        y: Tensor = self._operator(x, *self._blocks, self._outputs, None, True)
        return y


def _operator(linear: nn.Linear | Int8Linear) -> Any:
    """None where this machine has none for the layer's dtype."""
    names = {
        torch.int8: "int8_linear",
        torch.bfloat16: f"{native.way_of_bfloat16()}_linear",
        torch.float32: "float32_linear",
    }
    return getattr(torch.ops.coppice, names.get(linear.weight.dtype, ""), None)


def _pack(*linears: nn.Linear | Int8Linear) -> list[Tensor]:
    """Their outputs side by side: weight [B, in / n, 64, n], then what belongs to each of [B, 64].

    Of int8 that is scale, zero (int32) and bias, of halves scale and bias, else the bias alone.
    """
    weight = _to_blocks([linear.weight for linear in linears])
    bias = _to_blocks([_bias(linear) for linear in linears])
    if weight.dtype == torch.bfloat16 and native.way_of_bfloat16() == "half":
        half, scale = _halve(weight)
        return [half.transpose(1, 2).unsqueeze(-1).contiguous(), scale, bias]
    blocks = weight.view(*weight.shape[:2], -1, 4 // weight.itemsize).transpose(1, 2).contiguous()
    if weight.dtype != torch.int8:
        return [blocks, bias]
    scale = _to_blocks([linear.scale for linear in linears])
    return [blocks, scale, _ZERO * weight.sum(2, dtype=torch.int32), bias]


def _halve(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float16 below 2^5, the power of two of each output [B, 64] float32) of [B, 64, in].

    Exact down to 2^-22 of an output's largest weight.
    """
    top = weight.abs().amax(2).float()
    scale = torch.exp2(torch.frexp(top).exponent.clamp(min=-100) - _HALF_BITS).float()
    return (weight / scale.unsqueeze(-1).to(weight.dtype)).half(), scale


def _bias(linear: nn.Linear | Int8Linear) -> Tensor:
    size = len(linear.weight)
    return torch.zeros(size) if linear.bias is None else linear.bias.float()


def _to_blocks(parts: list[Any]) -> Tensor:
    """[outputs, ...] of each -> [B, 64, ...]; the last block is filled with zeros."""
    joined = torch.cat(parts)
    missing = joined.new_zeros(-len(joined) % _WIDE, *joined.shape[1:])
    return torch.cat([joined, missing]).view(-1, _WIDE, *joined.shape[1:])
