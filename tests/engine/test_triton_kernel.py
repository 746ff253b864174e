"""The Triton kernel: right when interpreted, compiles for real cards, and right on one.

Faults planted one at a time, each of which turned `triton_cases` red: a query that does not see its
own key; a window longer by one; the first key of a window, the last key of a past or the last block
of keys left out; keys beyond the item not masked; the running sum or the running result not
rescaled when the best score rises, in either program; partials stored by row instead of by token;
query heads of the first KV head for all; keys of the first KV head for all; the sink left out or
counted twice; an absent partial counted with a score of 0; half the soft cap's slope; positions
that do not advance where a span is cut.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.kernels import triton_kernel
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.triton_kernel import attend, upload
from pipeline.engine.kernels.work_items import plan_work
from tests.engine.attention_cases import build_tree, random_layer, with_views

CASES = Path(__file__).with_name("triton_cases.py")
FOREST = build_tree(
    [(0, 900, 0), (1, 70, 0), (2, 130, 90), (2, 9, 1), (1, 30, 1), (0, 50, 50)], [3, 0, 5, 1, 4, 2]
)
SMALLEST_SHARED_MEMORY = 99 << 10  # bytes a program may have on consumer Ampere and Ada cards


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_programs_equal_the_reference_under_the_interpreter(which: str) -> None:
    """In a process of their own: triton decides at its first import whether it interprets."""
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout[-500:]


class Launches:
    """Stands in for a program: keeps what it would be started with."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *args, **options: self.seen.append((args, options))


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"), [(80, 80, torch.float32), (90, 128, torch.bfloat16)]
)
def test_the_programs_compile_for_a_card(
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Triton brings the assembler along, so machine code can be made without a card, but not run.

    What is compiled is what `attend` would start: the same types, constants and options.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget

    from pipeline.engine.kernels import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layer = random_layer(FOREST, (8, 2), head_dim, dtype)
    work = upload(plan_work(FOREST.spans, FOREST.positions, 4, 64, 256), torch.device("cpu"))
    rules = AttentionRules(0.1, window=64, softcap=5.0, sinks=torch.zeros(8))
    programs = {name: getattr(triton_programs, name) for name in ("attend_items", "merge_partials")}
    launches = {name: Launches() for name in programs}
    for name, launch in launches.items():
        monkeypatch.setattr(triton_programs, name, launch)
    attend(layer.query, layer.keys, layer.values, work, rules)
    assert len(launches["attend_items"].seen) == 2, "large and small tiles"
    for name, program in programs.items():
        for args, options in launches[name].seen:
            constants = {k: options.pop(k) for k in list(options) if k.isupper()}
            types = [triton.runtime.jit.mangle_type(arg) for arg in args]
            signature = dict(zip(program.arg_names, types, strict=False))
            source = triton.compiler.ASTSource(
                program, signature | dict.fromkeys(constants, "constexpr"), constants
            )
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= SMALLEST_SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not triton_kernel.is_available(), reason="no CUDA device with triton here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_card_equals_the_reference(dtype: torch.dtype) -> None:
    viewed = with_views(FOREST, np.arange(len(FOREST.spans)) % 2 == 0)
    shapes = [(8, 8), (6, 2), (32, 8)], [64, 80, 128, 256]
    for tree, heads, head_dim in itertools.product((FOREST, viewed), *shapes):
        layer = random_layer(tree, heads, head_dim, dtype, "cuda")
        rep = heads[0] // heads[1]
        plan = plan_work(tree.spans, tree.positions, rep, 64, 256, tree.owner)
        work = upload(plan, torch.device("cuda"))
        for rules in (
            AttentionRules(head_dim**-0.5),
            AttentionRules(head_dim**-0.5, 100, 20.0, torch.randn(heads[0], device="cuda")),
        ):
            out = attend(layer.query, layer.keys, layer.values, work, rules)
            expected = attend_reference(
                layer.query, layer.keys, layer.values, work.positions[: len(layer.query)],
                tree.spans, rules, tree.owner,
            )  # fmt: skip
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
