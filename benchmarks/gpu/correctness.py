"""Whether what an interpreter showed holds on the card: kernels, recordings, their failure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu import around
from benchmarks.gpu.child import Bench
from benchmarks.gpu.workload import DRY_WORKLOAD, Workload
from benchmarks.prompts import plan_prompts
from pipeline.engine import recordings
from pipeline.engine.base import RunControl
from pipeline.engine.cuda_graphs import Recorder
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.triton_kernel import TritonKernel, attend
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.step_memory import Replay
from pipeline.engine.verify.self_test import self_test
from pipeline.settings import EngineSettings
from tests.engine.attention_cases import build_tree, random_layer

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_CASES = (
    (torch.bfloat16, (32, 8), 64), (torch.bfloat16, (32, 8), 128), (torch.float32, (4, 2), 64),
    (torch.float16, (32, 8), 128), (torch.bfloat16, (14, 2), 64), (torch.bfloat16, (8, 4), 256),
    (torch.bfloat16, (32, 32), 96), (torch.float32, (32, 8), 128),
)  # fmt: skip
_DRY_CASES = ((torch.float32, (4, 2), 16),)
_ORDER = [3, 0, 5, 1, 4, 2]
_FOREST = build_tree(
    [(0, 900, 0), (1, 70, 0), (2, 130, 90), (2, 9, 1), (1, 30, 1), (0, 50, 50)], _ORDER
)
_SMALL_FOREST = build_tree(
    [(0, 40, 0), (1, 20, 3), (2, 5, 1), (2, 9, 4), (1, 7, 1), (0, 18, 1)], _ORDER
)


def kernel(bench: Bench, argument: str) -> None:
    """Every kind of head, number and rule against the slow reference, in memory full of NaN."""
    device = bench.device
    forest = _SMALL_FOREST if bench.is_dry else _FOREST
    for seed, (dtype, heads, head_dim) in enumerate(_DRY_CASES if bench.is_dry else _CASES):
        sinks = torch.randn(heads[0], device=device)
        plain = AttentionRules(head_dim**-0.5)
        for rules in (plain, AttentionRules(head_dim**-0.5, 100, 20.0, sinks)):
            begin = time.perf_counter()
            layer = random_layer(forest, heads, head_dim, dtype, str(device), seed)
            on_device = TritonKernel(*heads, device)
            work = on_device.prepare(forest.spans, forest.positions)
            _poison(device, small=bench.is_dry)
            out = attend(layer.query, layer.keys, layer.values, work, rules)
            expected = attend_reference(
                layer.query.float(), layer.keys.float(), layer.values.float(),
                work.positions[: len(out)], forest.spans, rules,
            )  # fmt: skip
            error = float((out.float() - expected).norm() / expected.norm())
            row = {"dtype": str(dtype), "heads": heads, "head_dim": head_dim, "error": error}
            row["seconds"] = time.perf_counter() - begin
            if not error < _TOLERANCE[dtype]:
                row["failed"] = f"{error} of the reference's norm"
            bench.say(window=rules.window, **row)
    around.check(bench)


def _poison(device: torch.device, *, small: bool) -> None:
    """Freshly allocated memory then holds NaN: a result that is not written shows."""
    size = 1 << (12 if small else 24)
    held = [torch.full((size,), float("nan"), device=device) for _ in range(4)]
    del held


def engine(bench: Bench, shape: str) -> None:
    """The self-test; rows by recorded steps against plain ones; a second job records nothing."""
    loaded = bench.model(shape)
    job = DRY_WORKLOAD if bench.is_dry else Workload(rows=48, shared=500, own=9, new=24)
    with _recording_by(_Repeat()) if bench.is_dry else nullcontext():
        on_card = PrefixEngine(loaded, EngineSettings())
        if not bench.is_dry:
            bench.say(self_test=self_test(on_card), kernel=on_card.backend.kernel.name)
        for name in ("first job", "second job"):
            begin = time.perf_counter()
            recorded = _tokens(on_card, job)
            seconds = time.perf_counter() - begin
            assert on_card.recordings is not None, "no steps of this kernel can be recorded"
            bench.say(what=name, seconds=seconds, recorded=on_card.recordings.describe())
    with _recording_by(None):
        plain = _tokens(PrefixEngine(loaded, EngineSettings()), job)
    same = sum(recorded[s] == plain[s] for s in plain)
    row = {"what": "rows as without graphs", "same": same, "of": len(plain)}
    bench.say(**row, **({} if same == len(plain) else {"failed": "graphs change tokens"}))


class _Repeat:
    """In place of a CUDA graph, in a rehearsal: repeats the work by calling it again."""

    def __call__(self, work: Callable[[], None]) -> Replay:
        return work


def _recording_by(recorder: Recorder | None) -> AbstractContextManager[Any]:
    """Engines that run meanwhile record with it."""
    return mock.patch.object(recordings, "choose_recorder", lambda device: recorder)


def _tokens(on_card: PrefixEngine, job: Workload) -> dict[int, tuple[int, ...]]:
    vocabulary = on_card.loaded.shape.vocabulary_size
    plan = plan_prompts(job.prompts(vocabulary), vocabulary, job.new)
    everything = np.arange(len(plan.sequences))
    return {c.sequence: c.token_ids for c in on_card.generate(plan, everything, RunControl())}


_FAILING = """
import sys, torch
from pipeline.engine.recordings import CudaRecorder
x = torch.ones(4, device="cuda")
recorder = CudaRecorder(torch.device("cuda"))
def waits():
    (x * 2).sum().item()
def fails_late():
    if torch.cuda.is_current_stream_capturing():
        (x * 2).sum().item()
for work in (waits, fails_late):
    try:
        recorder(work)
        sys.exit("a step that waits was recorded")
    except RuntimeError as error:
        print(work.__name__, "refused:", str(error).splitlines()[0])
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "another stream is left"
    y = torch.ones(1 << 28, device="cuda")
    del y
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    recorder(lambda: x.mul_(2))()
    torch.cuda.synchronize()
print("stream, allocator and recorder live on")
"""


def capture(bench: Bench, argument: str) -> None:
    """What a recording that fails leaves behind: one refused before it begins, one half way."""
    if bench.is_dry:
        return
    command = [sys.executable, "-c", _FAILING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    row = {"code": done.returncode, "out": done.stdout.splitlines()}
    if done.returncode:
        row["failed"] = done.stderr.splitlines()[-4:]
    bench.say(**row)
