"""Linear layers of the same input as one product, without a second copy of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class MergedLinear:
    """y = x W^T + b of several layers, side by side. x [N, in], y [N, sum of their outputs].

    The layers' own weights are views of the merged one from then on: whoever calls them gets what
    they gave before, and no weight is held twice.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self.weight = _merge([layer.weight for layer in linears])
        self.bias = _merge_biases(linears)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _merge(parts: list[Tensor]) -> Tensor:
    """[outputs of all, in]"""
    first = parts[0].data
    rows = [len(part) for part in parts]
    if _lie_side_by_side(parts):  # they were merged before, or are alone
        return first.as_strided((sum(rows), first.shape[1]), first.stride())
    merged = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(merged, rows), strict=True):
        part.data = view
    return merged


def _lie_side_by_side(parts: list[Tensor]) -> bool:
    end = parts[0].data_ptr()
    memory = parts[0].untyped_storage().data_ptr()
    for part in parts:
        is_here = part.untyped_storage().data_ptr() == memory and part.data_ptr() == end
        if not (is_here and part.is_contiguous()):
            return False
        end += part.numel() * part.element_size()
    return True


def _merge_biases(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    """[outputs of all]; 0 where a layer has none, None where none has one."""
    if all(layer.bias is None for layer in linears):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data
            for layer in linears
        ]
    )
