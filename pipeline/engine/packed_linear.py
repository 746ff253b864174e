"""A linear layer whose weight lies as oneDNN wants it, with the step that follows it fused.

torch's own `linear` brings the weight into this order on every call, and in float32 takes a
GEMM that leaves half of an AVX-512 core unused (`LOG.md` has the figures). The operators are
private in torch; without them the plain layer computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DTYPES = (torch.bfloat16, torch.float32)


def is_available(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU can pack weights of `dtype`."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in operators)
    is_fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_operators and is_fast and dtype in _DTYPES


class PackedLinear:
    """y = x W^T + b. x [N, in], weight [out, in], bias [out] or None; y [N, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    @classmethod
    def of(cls, *linears: nn.Linear) -> PackedLinear:
        """The outputs of `linears`, side by side."""
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        weights: list[Tensor] = [linear.weight for linear in linears]
        return cls(torch.cat(weights), torch.cat(biases) if biases else None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        """silu(y), rounded once."""
        return self._apply(x, "swish")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, rounded once."""
        return self._combine(x, other, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """y * other, rounded once."""
        return self._combine(x, other, "mul")

    def _apply(self, x: Tensor, name: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], "")
        return y

    def _combine(self, x: Tensor, other: Tensor, name: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, name
        )
        return y


class PackedGate:
    """silu(gate(x)) * up(x), the gated part of an MLP. x [N, in]; [N, out] of x's dtype."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        self._gate, self._up = PackedLinear.of(gate), PackedLinear.of(up)

    def __call__(self, x: Tensor) -> Tensor:
        """The product; each factor is rounded."""
        return self._up.times(x, self._gate.silu(x))
