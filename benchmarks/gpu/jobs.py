"""Whole jobs: ours and transformers' `generate_batch` from ids to ids, and the demo as a person
runs it."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
from transformers import GenerationConfig

from benchmarks.gpu.child import Bench
from benchmarks.gpu.timing import wait
from benchmarks.gpu.workload import DRY_WORKLOAD, WORKLOAD, Workload
from benchmarks.prompts import Prompts, plan_prompts
from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.model import LoadedModel
from pipeline.settings import EngineSettings

_WARM_UP = Workload(rows=8, shared=200, own=16, new=4)
_LINES_TOLD = 24
_DEMO = "from pipeline.cli import main; main()"


def job(bench: Bench, shape: str) -> None:
    """Ours: a small job to warm up, then the job itself, then once more with all recorded."""
    loaded = bench.model(shape)
    workload = DRY_WORKLOAD if bench.is_dry else WORKLOAD
    engine = PrefixEngine(loaded, EngineSettings(max_rows=workload.rows))
    if not bench.is_dry:
        _generate(engine, _WARM_UP)
    for name in ("first",) if bench.is_dry else ("first", "second"):
        begin = time.perf_counter()
        _generate(engine, workload)
        wait(loaded.device)
        counters = engine.counters
        row = _row(workload, time.perf_counter() - begin)
        row["prefill_s"] = counters.prefill_s
        row["decode_step_s"] = counters.decode_s / max(1, workload.new - 1)
        assert engine.recordings is not None
        bench.say(arm="coppice", run=name, recorded=engine.recordings.describe(), **row)


def peer(bench: Bench, shape: str) -> None:
    """`generate_batch`, alone in its process."""
    loaded = bench.model(shape)
    vocabulary = loaded.shape.vocabulary_size
    _generate_batch(loaded, _WARM_UP.prompts(vocabulary), _WARM_UP.new)
    wait(loaded.device)
    begin = time.perf_counter()
    _generate_batch(loaded, WORKLOAD.prompts(vocabulary), WORKLOAD.new)
    wait(loaded.device)
    bench.say(arm="generate_batch", **_row(WORKLOAD, time.perf_counter() - begin))


def demo(bench: Bench, argument: str) -> None:
    """The whole command on the card: run, audit, report."""
    folder = bench.out / "coppice-demo"
    command = [sys.executable, "-c", _DEMO, "demo", "-o", str(folder)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"code": done.returncode, "seconds": time.perf_counter() - begin}
    said = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        row["failed"] = done.stderr.splitlines()[-4:]
    bench.say(**row, said=said[-_LINES_TOLD:])


def _row(workload: Workload, seconds: float) -> dict[str, Any]:
    tokens = workload.rows * workload.new
    return {"seconds": seconds, "tokens_per_s": tokens / seconds}


def _generate(engine: PrefixEngine, workload: Workload) -> None:
    vocabulary, new = engine.loaded.shape.vocabulary_size, workload.new
    plan = plan_prompts(workload.prompts(vocabulary), vocabulary, new)
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        if completion.error_type is not None or len(completion.token_ids) != new:
            raise RuntimeError(f"row {completion.sequence}: {completion.error_message}")


def _generate_batch(loaded: LoadedModel, prompts: Prompts, new: int) -> None:
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = loaded.model.generate_batch(prompts, generation_config=greedy).values()
    lengths = [len(o.generated_tokens) for o in outputs]
    if lengths != [new] * len(prompts):
        raise RuntimeError(f"generate_batch gave {sum(lengths)} tokens in {len(lengths)} rows")
