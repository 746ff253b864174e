"""The attention kernel's machine code for a card, read where there is none: `python -m
benchmarks.gpu.compiled` prints a table.

Triton brings the assembler and a disassembler along. What is compiled is what a launch on such a
card would compile: the same types, constants, options, and what is known of strides and addresses.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.kernels.triton_kernel import Launches, upload
from pipeline.engine.kernels.work_items import plan_work
from tests.engine.attention_cases import build_tree, random_layer

HOPPER = 90
_ROWS_BELOW = 40
_TREE = build_tree([(0, 900, 0), *[(1, 9, 1)] * _ROWS_BELOW], [*range(_ROWS_BELOW + 1)])
_BRANCH = re.compile(r"BRA(?:\.\w+)* (?:`\(\.L\w+\)|0x(?P<to>[0-9a-f]+))")
_INSTRUCTION = re.compile(r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<text>.+?)\s*;")
_PRODUCTS = ("HGMMA", "HMMA", "FFMA")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which `attend_items` is compiled; heads (query, KV)."""

    dtype: torch.dtype
    head_dim: int
    block_m: int
    rules: AttentionRules | None = None
    heads: tuple[int, int] = (32, 8)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        is_plain = self.rules is None or not self.rules.window
        marks = "" if is_plain else ", window and soft cap"
        return f"{dtype} d{self.head_dim} M{self.block_m}{marks}"


class Resources(NamedTuple):
    """Of each thread: registers, and bytes that found no room in them."""

    registers: int
    stack: int


class Code(NamedTuple):
    """What a program costs: `loop` counts the instructions of its leanest loop with products, which
    is the one that long prefixes run in; `product` is the instruction that multiplies there."""

    registers: int
    stack: int
    shared: int
    loop: int
    product: str


PRODUCTS_OWN = (
    Variant(torch.bfloat16, 64, 16),
    Variant(torch.bfloat16, 64, 64),
    Variant(torch.bfloat16, 128, 16),
    Variant(torch.bfloat16, 128, 64),
)
"""What a job of 1B or 8B runs."""


def compile_variant(variant: Variant, capability: int = HOPPER) -> Code:
    """Raises ImportError without triton, OSError without its tools."""
    program = _compiled(variant, capability)
    loop, product = leanest_loop(_ask_tool("-sass", program))
    return Code(*resources(program), int(program.metadata.shared), loop, product)


def resources(program: Any) -> Resources:
    """What a compiled program takes."""
    usage = _ask_tool("-res-usage", program)
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Resources(counts["REG"], counts["STACK"])


def leanest_loop(sass: str) -> tuple[int, str]:
    """Instructions of the shortest innermost loop that multiplies, and by what."""
    lines = [(int(m["at"], 16), m["text"]) for m in _INSTRUCTION.finditer(sass)]
    loops = []
    for at, text in lines:
        branch = _BRANCH.search(text)
        if branch is not None and branch["to"] and int(branch["to"], 16) < at:
            loops.append((int(branch["to"], 16), at))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    found = []
    for low, high in inner:
        body = [text for at, text in lines if low <= at <= high]
        product = next((p for p in _PRODUCTS if any(p in text for text in body)), None)
        if product is not None:
            found.append((len(body), product))
    return min(found)


def _compiled(variant: Variant, capability: int) -> Any:
    """Triton's compiled program for tiles of `block_m` rows."""
    from pipeline.engine.kernels import triton_programs

    head_dim, rep = variant.head_dim, variant.heads[0] // variant.heads[1]
    layer = random_layer(_TREE, variant.heads, head_dim, variant.dtype)
    arena = torch.zeros(2, variant.heads[1], _TREE.capacity, head_dim, dtype=variant.dtype)
    work = upload(plan_work(_TREE.spans, _TREE.positions, rep, 64, 256), torch.device("cpu"))
    rules = variant.rules or AttentionRules(head_dim**-0.5)
    launches = Launches.of(layer.query.contiguous(), (arena[0], arena[1]), work, rules)
    attend = CompileOnly(triton_programs.attend_items)
    merge = CompileOnly(triton_programs.merge_partials)
    with (
        card(capability),
        mock.patch.object(triton_programs, "attend_items", attend),
        mock.patch.object(triton_programs, "merge_partials", merge),
    ):
        launches._attend(work.large, variant.block_m)
        launches.merge()
    return attend.compiled[0]


class CompileOnly:
    """Stands in for a program: compiles what it would be started with."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_it(*args: Any, **options: Any) -> None:
            self.compiled.append(self._program.warmup(*args, grid=grid, **options))

        return compile_it


@contextmanager
def card(capability: int) -> Iterator[None]:
    """Triton believes in a card of this capability; it can compile for it, and run nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Card:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # programs are kept by device, and those of two cards differ

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def map_python_to_cpp_type(self, name: str) -> str:
            from triton.backends.nvidia.driver import ty_to_cpp

            return str(ty_to_cpp(name))

    active = driver._active
    driver.set_active(Card())
    try:
        yield
    finally:
        driver._active = active


def _ask_tool(flag: str, program: Any) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    print("| program | registers | stack | shared KB | product | instructions in the loop |")
    print("|---|---|---|---|---|---|")
    windowed = AttentionRules(0.1, window=1024, softcap=20.0)
    more = (
        Variant(torch.bfloat16, 64, 128),
        Variant(torch.bfloat16, 128, 128),
        Variant(torch.bfloat16, 128, 64, windowed),
        Variant(torch.float32, 64, 64, heads=(4, 2)),
        Variant(torch.float32, 128, 64),
    )
    for variant in (*PRODUCTS_OWN, *more):
        code = compile_variant(variant)
        print(
            f"| {variant} | {code.registers} | {code.stack} B | {code.shared >> 10} "
            f"| {code.product} | {code.loop} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
