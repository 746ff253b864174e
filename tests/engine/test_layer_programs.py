"""The Triton programs around attention: right when interpreted, and lean machine code for a card.

Faults planted one at a time, each of which turned `layer_cases` red: the sum not kept, or kept
where chosen rows are joined; the first rows for the chosen ones; a mean over the padded block; the
multiplier or the weight of the norm behind a sublayer left out; the second half turned by the
turned first; values turned or normed as keys are; tokens turned as views, all views by the first
one's turn, or by the table of another token; keys normed by the queries' mean or weight; numbers
beyond the pairs left out of the norm or not stored; gate and up exchanged; tanh in place of erf; a
number beyond a row written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.around import CASES, Sizes
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import Packer, pack_decode
from pipeline.engine.triton_forward import TritonForward

CASES_FILE = Path(__file__).with_name("layer_cases.py")
MOST_REGISTERS = {"join": 64, "rotate_and_store": 48, "gate": 40}
"""With so few, a multiprocessor of sm_90 has room for 32 warps and more."""


def test_the_programs_equal_their_slow_meaning_under_the_interpreter() -> None:
    """In a process of their own: triton decides at its first import whether it interprets."""
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-500:]


@pytest.mark.parametrize(
    "sizes",
    [*CASES[:2], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in CASES[2:])],
    ids=str,
)
def test_code_for_a_card_spills_nothing(sizes: Sizes) -> None:
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    from benchmarks.gpu.compiled_steps import compile_steps

    for name, taken in compile_steps(sizes, is_whole=True).items():
        assert taken.stack == 0, f"{name} spills registers: {taken}"
        assert taken.registers <= MOST_REGISTERS[name], (name, taken)


def test_what_is_compiled_beforehand_is_what_a_forward_starts() -> None:
    """Else a card's minutes would go into compiling: sizes and addresses decide about it, too."""
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    from benchmarks.gpu.compiled_steps import compiling, start
    from benchmarks.gpu.launches import small_llama

    cpu, model = torch.device("cpu"), small_llama(2)
    rows, nothing = np.arange(7), np.zeros((0, 5), np.int64)
    own = (rows * 5, rows * 5 + 3)
    batch = pack_decode(rows, rows * 0 + 2, own, nothing, Packer(TorchKernel(cpu), cpu))
    at_odd_addresses = torch.cat([batch.slots[:1], batch.slots])[1:]
    cache = KVCache((2, 2, 16), 60, like=next(model.parameters()))
    with compiling() as started, torch.no_grad():
        TritonForward(model)(replace(batch, slots=at_odd_addresses), cache, torch.arange(7)[1:4])
    with compiling() as known:
        start(Sizes(torch.bfloat16, 64, 96, (4, 2), 16, 8), is_whole=True)
    for name, program in started.items():
        hashes = {compiled.hash for compiled in program.compiled}
        assert hashes and hashes <= {compiled.hash for compiled in known[name].compiled}, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_card_gives_the_slow_meaning(tmp_path: Path) -> None:
    import time

    from benchmarks.gpu import around
    from benchmarks.gpu.child import Bench

    said = []
    bench = Bench(tmp_path, is_dry=False, until=time.monotonic() + 100)
    bench.say = lambda **row: said.append(row)  # type: ignore[method-assign]
    around.check(bench)
    assert said and not [row for row in said if "failed" in row]
