"""The steps around attention: whether they are right on the card, and how long they take.

Right is the slow meaning in plain torch (`layer_rules.py`), which is also what they are timed
against: an operation a step, as a model's own code has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.child import Bench
from benchmarks.gpu.roofline import Card
from benchmarks.gpu.timing import rotation, seconds_a_call
from benchmarks.limit import Dimensions
from pipeline.engine.kernels import layer_rules, layer_steps
from pipeline.engine.kernels.layer_rules import (
    ACTIVATIONS,
    Activation,
    HeadNorms,
    Heads,
    Joint,
    Norm,
    Place,
    Viewing,
)

_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_ROWS = 67


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one layer. `norms`: of each "head", of "all" heads, or none; `pairs` of a head turn."""

    dtype: torch.dtype
    hidden: int
    intermediate: int
    heads: tuple[int, int]
    head_dim: int
    pairs: int
    norms: str = ""
    activation: Activation = "silu"

    @classmethod
    def of(cls, model: Dimensions, dtype: torch.dtype) -> Sizes:
        """Of a Llama."""
        size = model.hidden // model.heads
        heads = model.heads, model.kv_heads
        return cls(dtype, model.hidden, model.intermediate, heads, size, size // 2)


CASES = (
    Sizes(torch.bfloat16, 2048, 8192, (32, 8), 64, 32),
    Sizes(torch.bfloat16, 4096, 14336, (32, 8), 128, 64),
    Sizes(torch.float32, 128, 384, (4, 2), 32, 16),
    Sizes(torch.float16, 3584, 18944, (28, 4), 128, 64),
    Sizes(torch.bfloat16, 2304, 9216, (8, 4), 256, 128, activation="gelu_tanh"),
    Sizes(torch.bfloat16, 2560, 9728, (32, 8), 128, 64, "head"),
    Sizes(torch.bfloat16, 4096, 11008, (32, 32), 128, 64, "all", "gelu"),
    Sizes(torch.float32, 3072, 8192, (24, 8), 128, 48),
)
"""Heads and widths of Llama 1B and 8B, the demo, Qwen2, Gemma-2, Qwen3, OLMo-2, Phi-4-mini."""
DRY_CASES = (Sizes(torch.float32, 24, 40, (4, 2), 16, 6, "head"),)


class Layer(NamedTuple):
    """Random numbers for every step of one layer; memory that nobody owns holds NaN."""

    stream: Tensor
    added: Tensor
    joint: Joint
    qkv: Tensor
    heads: Heads
    place: Place
    both: Tensor

    @classmethod
    def of(cls, sizes: Sizes, rows: int, device: torch.device) -> Layer:
        def drawn(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        num_heads, kv_heads = sizes.heads
        weights = {"head": 2, "all": num_heads + kv_heads}
        norms = None
        if sizes.norms:
            weight = drawn(weights[sizes.norms], sizes.head_dim, dtype=torch.float32)
            norms = HeadNorms(weight, 1e-6)
        turn = (drawn(rows, 2 * sizes.pairs), drawn(rows, 2 * sizes.pairs))
        arena = torch.full((2, kv_heads, 2 * rows, sizes.head_dim), float("nan"), device=device)
        keys, values = arena.to(sizes.dtype)
        norm = Norm(drawn(sizes.hidden, dtype=torch.float32), 1e-6)
        return cls(
            drawn(rows, sizes.hidden), drawn(rows, sizes.hidden), Joint(norm),
            drawn(rows, (num_heads + 2 * kv_heads) * sizes.head_dim),
            Heads(norms, turn, sizes.pairs),
            Place(keys, values, torch.randperm(2 * rows, device=device)[:rows]),
            drawn(rows, 2 * sizes.intermediate),
        )  # fmt: skip

    def steps(self, module: Any, mark: str, activation: Activation) -> dict[str, Callable[[], Any]]:
        """Each step by `module`, whose names end with `mark`."""
        join, rotate, gate = (
            getattr(module, name + mark) for name in ("join", "rotate_and_store", "gate")
        )
        return {
            "join": lambda: join(self.stream, self.added, self.joint),
            "rotate": lambda: rotate(self.qkv, self.heads, self.place),
            "gate": lambda: gate(self.both, activation),
        }


def check(bench: Bench) -> None:
    """Every step of every kind against its slow meaning; a row each."""
    for sizes in DRY_CASES if bench.is_dry else CASES:
        layer = Layer.of(sizes, 5 if bench.is_dry else _ROWS, bench.device)
        for name, error in _errors(sizes, layer).items():
            row = {"step": name, "sizes": str(sizes), "error": error}
            if not error < _TOLERANCE[sizes.dtype]:
                row["failed"] = f"{error} of the reference's norm"
            bench.say(**row)


def _errors(sizes: Sizes, layer: Layer) -> dict[str, float]:
    rows = torch.arange(len(layer.stream), device=layer.stream.device).flip(0)[::2].contiguous()
    after = layer.joint._replace(after=layer.joint.before, multiplier=0.5)
    pairs = tuple(torch.rand(len(rows), sizes.pairs, device=rows.device) for _ in range(2))
    viewing = Viewing(rows, (pairs[0], pairs[1]))
    errors = {}
    for name, of_rows in (("join", None), ("join of rows", rows)):
        sums = layer.stream.clone(), layer.stream.clone()
        ours = layer_steps.join(sums[0], layer.added, after, of_rows)
        plain = layer_rules.join_reference(sums[1], layer.added, after, of_rows)
        errors[name] = max(_error(ours, plain), _error(*sums))
    for name, seen in (("rotate", None), ("rotate, with views", viewing)):
        places = [Place(*(x.clone() for x in layer.place)) for _ in range(2)]
        query = layer_steps.rotate_and_store(layer.qkv, layer.heads, places[0], seen)
        plain = layer_rules.rotate_and_store_reference(layer.qkv, layer.heads, places[1], seen)
        kv = zip(places[0][:2], places[1][:2], strict=True)
        errors[name] = max(_error(query, plain), *(_error(x, y) for x, y in kv))
    for activation in ACTIVATIONS:
        ours, plain = (
            layer_steps.gate(layer.both, activation),
            layer_rules.gate_reference(layer.both, activation),
        )
        errors[activation] = _error(ours, plain)
    return errors


def _error(ours: Tensor, expected: Tensor) -> float:
    """Of the norm; infinite where a number is missing, or is where none should be."""
    if not torch.equal(ours.isnan(), expected.isnan()):
        return float("inf")
    ours, expected = ours.float().nan_to_num(), expected.float().nan_to_num()
    return float((ours - expected).norm() / expected.norm())


def measure(sizes: Sizes, rows: int, card: Card, device: torch.device) -> dict[str, Any]:
    """Microseconds of each step, by its program and by torch, beside what its bytes must take."""
    count = rotation(rows * 4 * sizes.intermediate, device)
    layers = [Layer.of(sizes, rows, device) for _ in range(count)]
    qkv, item = layers[0].qkv.shape[1], layers[0].qkv.element_size()
    numbers = {"join": 4 * sizes.hidden, "rotate": 2 * qkv, "gate": 3 * sizes.intermediate}
    row: dict[str, Any] = {}
    for name, of_row in numbers.items():
        for module, mark in ((layer_steps, ""), (layer_rules, "_reference")):
            calls = [x.steps(module, mark, sizes.activation)[name] for x in layers]
            arm = "torch" if mark else "ours"
            row[f"{name}_{arm}_us"] = 1e6 * seconds_a_call(calls, device)
        row[f"{name}_floor_us"] = 1e6 * of_row * rows * item / card.bytes_per_s
    return row
