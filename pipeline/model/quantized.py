"""Checkpoints that hold their linear layers in 8 or 4 bits, read as plain weights.

weight [out, in] = (q - zero) * scale, with a scale and a zero for each output and group of inputs:

| layout | q | zeros | scales |
|---|---|---|---|
| int-quantized | `weight` int8 [out, in] | `weight_zero_point` | `weight_scale` [out, groups] |
| pack-quantized | `weight_packed` [out, in / n] | the same, or packed | the same |
| GPTQ | `qweight` [in / n, out] | `qzeros` [groups, out / n] | `scales` [groups, out] |
| AWQ (gemm) | `qweight` [in, out / n], in an order of its own | the same | the same |

The first two are of compressed-tensors. n numbers lie in a word of 32 bits, the lowest bits first.
Sources: vllm-project/compressed-tensors, AutoGPTQ and GPTQModel, AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.model.weights import READABLE_BITS, quantization_of, weight_files

Tensors = dict[str, Tensor]
"""Of one layer, by the last part of their names."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the i-th of 8 outputs lies in a word
_PARTS = frozenset({
    "weight", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape",
    "weight_g_idx", "qweight", "qzeros", "scales", "g_idx",
})  # fmt: skip
_MARKS = ("weight_packed", "qweight", "weight_scale")  # one of them, in each layer that is rounded


@dataclass(frozen=True)
class PlainWeights:
    """All tensors of a checkpoint by name, rounded layers as floats.

    `int8`: those that were saved in int8 with one scale for each output, as they were saved:
    weight [out, in] int8, scale [out] float32.
    """

    tensors: Tensors
    int8: dict[str, tuple[Tensor, Tensor]]


def read_plain(folder: Path, config: Any, dtype: torch.dtype) -> PlainWeights:
    """All safetensors of `folder`, as `config` says that they are; floats in `dtype`.

    Raises ValueError for tensors that do not belong together, OSError, SafetensorError.
    """
    said, tensors = quantization_of(config), Tensors()
    layers: dict[str, Tensors] = {}  # that may be rounded; their parts may lie in several files
    int8: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in _read(folder):
        layer, _, last = name.rpartition(".")
        if last in _PARTS:
            layers.setdefault(layer, {})[last] = tensor
        else:
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    while layers:
        layer, parts = layers.popitem()
        if not any(mark in parts for mark in _MARKS):
            if parts.keys() != {"weight"} or not parts["weight"].is_floating_point():
                raise ValueError(f"{layer} has only {', '.join(sorted(parts))} of a rounded layer")
            tensors[f"{layer}.weight"] = parts["weight"].to(dtype)
            continue
        try:
            rounded = _read_layer(parts, said)
            tensors[f"{layer}.weight"] = rounded.to_float().to(dtype)
        except (KeyError, RuntimeError, IndexError) as error:
            raise ValueError(f"the tensors of {layer} do not belong together: {error}") from None
        if rounded.is_int8:
            int8[layer] = rounded.q.to(torch.int8), rounded.scale.flatten()
    return PlainWeights(tensors, int8)


@dataclass(frozen=True)
class _Rounded:
    """q [out, in] int32; scale [out, groups] float32, zero [out, groups] int32; group [in]."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor

    @property
    def is_int8(self) -> bool:
        """Whether each output has one scale and no zero, and all numbers fit."""
        fits = bool(self.q.min() >= -128 and self.q.max() <= 127)
        return self.scale.shape[1] == 1 and not self.zero.any() and fits

    def to_float(self) -> Tensor:
        """The weight, float32."""
        return (self.q - self.zero[:, self.group]) * self.scale[:, self.group]


def _read_layer(tensors: Tensors, said: Mapping[str, Any]) -> _Rounded:
    method = said["quant_method"]
    if method == "compressed-tensors":
        return _compressed(tensors)
    bits = said["bits"]
    scale = tensors["scales"].T.float()
    if method == "awq":
        q = _in_awq_order(_unpack(tensors["qweight"], bits)).T
        zero = _in_awq_order(_unpack(tensors["qzeros"], bits)).T
    else:
        q, zero = _unpack(tensors["qweight"].T, bits), _unpack(tensors["qzeros"], bits).T
        if said.get("checkpoint_format", "gptq") == "gptq":  # which keeps one less, see GPTQModel
            zero = (zero + 1) % (1 << bits)
    return _Rounded(
        q, scale, zero, _groups(q, scale, tensors.get("g_idx"), said.get("group_size", -1))
    )


def _compressed(tensors: Tensors) -> _Rounded:
    if "weight_packed" in tensors:
        rows, columns = tensors["weight_shape"].tolist()
        bits = 32 * tensors["weight_packed"].shape[1] // columns
        if bits not in READABLE_BITS:
            raise ValueError(f"weights of {bits} bits are not known")
        q = _unpack(tensors["weight_packed"], bits)[:, :columns] - (1 << (bits - 1))
    else:
        q, bits = tensors["weight"].int(), 8
        rows = len(q)
    scale = tensors["weight_scale"].float()
    if scale.dim() < 2:  # of all of it, or of each output
        scale = scale.reshape(-1, 1)
    scale = scale.expand(rows, -1)
    zero = tensors.get("weight_zero_point", torch.zeros(1, 1, dtype=torch.int8))
    if zero.dtype == torch.int32 and zero.shape[0] != rows:
        zero = _unpack(zero.T, bits).T[:rows] - (1 << (bits - 1))
    zero = zero.int().reshape(-1, zero.shape[-1]).expand(*scale.shape)
    return _Rounded(q, scale, zero, _groups(q, scale, tensors.get("weight_g_idx")))


def _groups(q: Tensor, scale: Tensor, said: Tensor | None, size: int = -1) -> Tensor:
    """The group of each input: as the checkpoint says, or all groups are of one size."""
    if said is not None and (said >= 0).all():
        return said.long()
    if size <= 0 and q.shape[1] % scale.shape[1]:
        raise KeyError("which inputs are of a group")
    return torch.arange(q.shape[1]) // (size if size > 0 else q.shape[1] // scale.shape[1])


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns] -> [rows, columns * 32 / bits], each from 0 on."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _in_awq_order(x: Tensor) -> Tensor:
    return x.view(len(x), -1, len(_AWQ_ORDER))[:, :, list(_AWQ_ORDER)].flatten(1)


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file_name in weight_files(folder):
        with safe_open(folder / file_name, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)
