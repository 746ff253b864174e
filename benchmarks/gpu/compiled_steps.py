"""Machine code of the steps around attention for a card, as `compiled` has it for attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from benchmarks.gpu.around import CASES, Layer, Sizes
from benchmarks.gpu.compiled import HOPPER, CompileOnly, Resources, card, resources
from pipeline.engine.kernels import layer_programs, layer_steps
from pipeline.engine.kernels.layer_rules import Viewing

_ROWS = 32
_PROGRAMS = ("join", "rotate_and_store", "gate")


def compile_steps(
    sizes: Sizes, *, is_whole: bool = False, capability: int = HOPPER
) -> dict[str, Resources]:
    """By step, the most that its programs take; `is_whole`: see `start`. Raises ImportError without
    triton, OSError without its tools."""
    with compiling(capability) as programs:
        start(sizes, is_whole=is_whole)
    found = {name: [resources(x) for x in made.compiled] for name, made in programs.items()}
    return {
        name: Resources(*(max(numbers) for numbers in zip(*taken, strict=True)))
        for name, taken in found.items()
    }


@contextmanager
def compiling(capability: int = HOPPER) -> Iterator[dict[str, CompileOnly]]:
    """The steps that are started meanwhile are compiled for a card, and not run."""
    with ExitStack() as stack:
        stack.enter_context(card(capability))
        programs = {name: CompileOnly(getattr(layer_programs, name)) for name in _PROGRAMS}
        for name, program in programs.items():
            stack.enter_context(mock.patch.object(layer_programs, name, program))
        yield programs


def start(sizes: Sizes, *, is_whole: bool) -> None:
    """Every step once; `is_whole`: in all ways that a forward starts it."""
    layer = Layer.of(sizes, _ROWS, torch.device("cpu"))
    layer_steps.join(layer.stream, layer.added, layer.joint)
    layer_steps.rotate_and_store(layer.qkv, layer.heads, layer.place)
    layer_steps.gate(layer.both, sizes.activation)
    if not is_whole:
        return
    rows = torch.arange(_ROWS)
    turn = torch.zeros(_ROWS, sizes.pairs)
    layer_steps.join(layer.stream, None, layer.joint)
    layer_steps.join(layer.stream, layer.added, layer.joint, rows)
    layer_steps.join(layer.stream, layer.added, layer.joint._replace(after=layer.joint.before))
    viewing = Viewing(rows, (turn, turn))
    layer_steps.rotate_and_store(layer.qkv, layer.heads, layer.place, viewing)


def main() -> None:
    print("| step | registers | stack |")
    print("|---|---|---|")
    for sizes in CASES:
        for name, taken in compile_steps(sizes, is_whole=True).items():
            print(f"| {name}, {sizes} | {taken.registers} | {taken.stack} B |", flush=True)


if __name__ == "__main__":
    main()
