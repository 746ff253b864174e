"""How many kernels a forward starts, counted where there is no card: `python -m
benchmarks.gpu.launches` prints a table, and what a step is then predicted to take.

Every operation of torch that computes something is one kernel on a card; views and allocations are
none. Triton programs are counted where they would be started, and compute nothing here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.roofline import FUSED, H100, UNFUSED, Rows, predict, step_floor_s
from benchmarks.gpu.workload import GPU_SHAPES, WORKLOAD
from benchmarks.limit import Dimensions
from pipeline.engine.forward import Forward, TransformersForward
from pipeline.engine.kernels import layer_programs, triton_programs
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import Packer, pack_decode
from pipeline.engine.triton_forward import TritonForward

_ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided")
_PROGRAMS = {
    layer_programs: ("join", "rotate_and_store", "gate"),
    triton_programs: ("attend_items", "merge_partials"),
}
_ROWS, _SHARED, _OWN = 40, 300, 5
_PREDICTED_PREFIX = 2048
Kernels = Counter[str]


class _Operations(TorchDispatchMode):
    """Counts what would start a kernel, by name."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _ALLOCATING and (func._schema.is_mutable or not _is_view(args, out)):
            self._kernels[name] += 1
        return out


def _is_view(args: Any, out: Any) -> bool:
    """Whether what comes out is memory that went in."""
    outs = [x for x in (out if isinstance(out, tuple | list) else [out]) if _has_numbers(x)]
    given = {x.untyped_storage().data_ptr() for x in args if _has_numbers(x)}
    return all(x.untyped_storage().data_ptr() in given for x in outs)


def _has_numbers(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0


@contextmanager
def counted() -> Iterator[Kernels]:
    """Counts all that is started meanwhile. What Triton programs write stays as it was."""
    kernels: Kernels = Counter()
    patches = [
        mock.patch.object(module, name, _Started(name, kernels))
        for module, names in _PROGRAMS.items()
        for name in names
    ]
    for patch in patches:
        patch.start()
    try:  # without `inference_mode`, in which composite operations are not taken apart
        with torch.no_grad(), _Operations(kernels):
            yield kernels
    finally:
        for patch in patches:
            patch.stop()


class _Started:
    """Stands in for a Triton program."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self._name, self._kernels = f"triton {name}", kernels

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert math.prod(grid) > 0

        def start(*args: Any, **options: Any) -> None:
            self._kernels[self._name] += 1

        return start


def of_a_step(model: PreTrainedModel, forward: Forward) -> Kernels:
    """Of the forward of one decode step, some rows below a shared prefix."""
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (config.num_hidden_layers, kv_heads, size)
    cache = KVCache(shape, _SHARED + _ROWS * _OWN, like=next(model.parameters()))
    packer = Packer(TritonKernel(heads, kv_heads, torch.device("cpu")), torch.device("cpu"))
    rows = np.arange(_ROWS)
    low = _SHARED + rows * _OWN
    batch = pack_decode(
        rows, rows * 0 + _SHARED + _OWN - 1, (low, low + _OWN),
        np.array([[0, _ROWS, 0, _SHARED, 0]]), packer,
    )  # fmt: skip
    every = torch.arange(_ROWS)
    with counted() as kernels:
        forward(batch, cache, every)
    return kernels


class Counts(NamedTuple):
    """Kernels of each layer but the last, by name; and of all else of a step."""

    layer: Kernels
    rest: Kernels

    @classmethod
    def of(
        cls, build: Callable[[int], PreTrainedModel], run: Callable[[PreTrainedModel], Forward]
    ) -> Counts:
        """`build` makes a model of so many layers."""
        one, two = (of_a_step(model, run(model)) for model in map(build, (1, 2)))
        layer = two - one
        return cls(layer, one - layer)


def plainly(model: PreTrainedModel) -> Forward:
    """By the model's own code."""
    return TransformersForward(model, pack_weights=False)


def small_llama(layers: int) -> PreTrainedModel:
    """Whose layers are those of any Llama."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main() -> None:
    print("| a Llama | kernels a layer | beside the layers | |")
    print("|---|---|---|---|")
    for name, run in (("the model's own code", plainly), ("fused", TritonForward)):
        counts = Counts.of(small_llama, run)
        parts = ", ".join(f"{count} {kernel}" for kernel, count in counts.layer.most_common())
        print(f"| {name} | {counts.layer.total()} | {counts.rest.total()} | {parts} |")
    print()
    print(f"| {WORKLOAD.rows} rows, prefix {_PREDICTED_PREFIX} | ms | share of the floor | parts |")
    print("|---|---|---|---|")
    for shape in ("1B", "8B"):
        model = Dimensions.of(GPU_SHAPES[shape])
        rows = Rows(WORKLOAD.rows, _PREDICTED_PREFIX, WORKLOAD.own_half_way)
        floor = step_floor_s(model, rows, H100)
        print(f"| {shape}, floor | {floor * 1e3:.2f} | | |")
        for name, engine in (("as it was", UNFUSED), ("fused", FUSED)):
            parts_s = predict(model, rows, H100, engine)
            step_s = parts_s.pop("step_s")
            told = ", ".join(f"{k.removesuffix('_s')} {v * 1e3:.2f}" for k, v in parts_s.items())
            print(f"| {shape}, {name} | {step_s * 1e3:.2f} | {floor / step_s:.2f} | {told} |")


if __name__ == "__main__":
    main()
