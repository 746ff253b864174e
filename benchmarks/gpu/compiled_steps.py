"""Machine code of the steps around attention for a card, as `compiled` has it for attention."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch

from benchmarks.gpu.around import CASES, Layer, Sizes
from benchmarks.gpu.compiled import HOPPER, CompileOnly, Resources, card, resources
from pipeline.engine.kernels import layer_programs, layer_steps
from pipeline.engine.kernels.layer_rules import Joint, Viewing

_ROWS = 32
_PROGRAMS = ("join", "rotate_and_store", "gate")


def compile_steps(
    sizes: Sizes, *, is_whole: bool = False, capability: int = HOPPER
) -> dict[str, Resources]:
    """By step, what its program takes; `is_whole`: in all ways that a forward starts it. Raises
    ImportError without triton, OSError without its tools."""
    device = torch.device("cpu")
    layer = Layer.of(sizes, _ROWS, device)
    rows = torch.arange(_ROWS)
    turn = torch.zeros(_ROWS, sizes.pairs)
    after = Joint(layer.joint.before, layer.joint.before)
    found: dict[str, Resources] = {}
    with ExitStack() as stack:
        stack.enter_context(card(capability))
        only = {name: CompileOnly(getattr(layer_programs, name)) for name in _PROGRAMS}
        for name, program in only.items():
            stack.enter_context(mock.patch.object(layer_programs, name, program))
        layer_steps.join(layer.stream, layer.added, layer.joint)
        layer_steps.rotate_and_store(layer.qkv, layer.heads, layer.place)
        layer_steps.gate(layer.both, sizes.activation)
        if is_whole:
            layer_steps.join(layer.stream, None, layer.joint)
            layer_steps.join(layer.stream, layer.added, layer.joint, rows)
            layer_steps.join(layer.stream, layer.added, after)
            viewing = Viewing(rows, (turn, turn))
            layer_steps.rotate_and_store(layer.qkv, layer.heads, layer.place, viewing)
    for name, program in only.items():
        taken = [resources(compiled) for compiled in program.compiled]
        found[name] = Resources(*(max(numbers) for numbers in zip(*taken, strict=True)))
    return found


def main() -> None:
    print("| step | registers | stack |")
    print("|---|---|---|")
    for sizes in CASES:
        for name, taken in compile_steps(sizes, is_whole=True).items():
            print(f"| {name}, {sizes} | {taken.registers} | {taken.stack} B |", flush=True)


if __name__ == "__main__":
    main()
