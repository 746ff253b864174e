"""An `Int8Linear` by the compiled kernel, with the step that follows it fused.

The kernel takes blocks of 64 outputs in which four inputs lie side by side (`int8.cpp`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.engine.kernels import native
from pipeline.model.int8 import Int8Linear

_WIDE = 64
_LANES = 16
_ZERO = 128


class _Blocks(NamedTuple):
    """Of B blocks: weight [B, in / 4, 64, 4] int8; scale, zero (int32) and bias, each [B, 64]."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor


def suits(linear: Int8Linear) -> bool:
    """Whether the kernel is there, which needs VNNI, and knows a layer of this size."""
    if any(size % _LANES for size in linear.weight.shape) or native.why_unavailable() is not None:
        return False
    return hasattr(torch.ops.coppice, "int8_linear")


class PackedInt8Linear:
    """As `PackedLinear`: x [..., in] bfloat16 or float32; y [..., out] of x's dtype."""

    def __init__(self, *linears: Int8Linear) -> None:
        """The outputs of `linears`, side by side."""
        self._outputs = sum(len(linear.weight) for linear in linears)
        self._blocks = _pack(*linears)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, rounded once."""
        return self._apply(x, other)

    def _apply(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        y: Tensor = torch.ops.coppice.int8_linear(rows, *self._blocks, self._outputs, other, False)
        return y.view(*x.shape[:-1], self._outputs)


class PackedInt8Gate:
    """As `PackedGate`, in one pass."""

    def __init__(self, gate: Int8Linear, up: Int8Linear) -> None:
        self._outputs = len(gate.weight)
        pairs = zip(_pack(gate), _pack(up), strict=True)
        self._blocks = _Blocks(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))

    def __call__(self, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x), rounded once."""
        y: Tensor = torch.ops.coppice.int8_linear(x, *self._blocks, self._outputs, None, True)
        return y


def _pack(*linears: Int8Linear) -> _Blocks:
    """Their outputs side by side; the last block is filled with zeros."""
    weight = _to_blocks([linear.weight for linear in linears])
    return _Blocks(
        weight.view(*weight.shape[:2], -1, 4).transpose(1, 2).contiguous(),
        _to_blocks([linear.scale for linear in linears]),
        _ZERO * weight.sum(2, dtype=torch.int32),
        _to_blocks([_bias(linear) for linear in linears]),
    )


def _bias(linear: Int8Linear) -> Tensor:
    return torch.zeros_like(linear.scale) if linear.bias is None else linear.bias.float()


def _to_blocks(parts: list[Tensor]) -> Tensor:
    """[outputs, ...] of each -> [B, 64, ...]."""
    joined = torch.cat(parts)
    missing = joined.new_zeros(-len(joined) % _WIDE, *joined.shape[1:])
    return torch.cat([joined, missing]).view(-1, _WIDE, *joined.shape[1:])
