"""Linear layers of int8: a scale for each output of the weight, one for each token of the input.

    y = (q_x q_w^T) s_x s_w + b      q in [-127, 127], s = largest magnitude / 127

(W8A8, symmetric, scales of tokens as they come.) Sums are exact in int32, so that a product's bits
depend on nothing that is computed beside it. The output layer, embeddings and norms stay as they
are. This is the arithmetic in plain torch; `engine/kernels/linear.cpp` is the same, faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_LARGEST = 127


class Int8Linear(nn.Module):
    """y = x W^T + b. `weight` [out, in] int8, `scale` [out] float32, `bias` [out] or None.

    x [..., in] of any float dtype; y [..., out] of the same. A token with a number that is not
    finite gives NaN.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Round `weight` [out, in] to int8."""
        q, scale = quantize(weight)
        return cls(q, scale.flatten(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """y."""
        q, scale = quantize(x.flatten(0, -2))
        sums = torch._int_mm(q, self.weight.T)
        y = sums.float() * scale * self.scale
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] as (q [n, k] int8, scale [n, 1] float32); the scale of a row that is not finite is
    NaN."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    most = torch.tensor(float(_LARGEST))  # by a plain number, torch multiplies with the reciprocal
    factor = torch.where(largest > 0, most / largest, 0.0)
    is_finite = largest.isfinite()
    q = torch.where(is_finite, x * factor, 0.0).round().to(torch.int8)
    return q, torch.where(is_finite, largest / _LARGEST, torch.nan)


def holds_int8(model: PreTrainedModel) -> bool:
    """Whether any layer does."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def hold_in_int8(
    model: PreTrainedModel, saved: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> list[str]:
    """Put an `Int8Linear` in the place of each linear layer but the output layer.

    `saved`: (weight, scale) of layers that need no rounding, by name. Returns the names of all.
    """
    head, saved = model.get_output_embeddings(), saved or {}
    names = [
        name
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and layer is not head
    ]
    for name in names:  # one after the other, so that few of them are held twice
        layer: Any = model.get_submodule(name)
        if name in saved:
            rounded = Int8Linear(*saved[name], layer.bias)
        else:  # GPT-2's `Conv1D` keeps [in, out]
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            rounded = Int8Linear.of(weight, layer.bias)
        model.set_submodule(name, rounded)
    return names
