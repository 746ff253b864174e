"""The main job's numbers: `python -m benchmarks.main_job` (or `make bench`). Last line: one JSON.

Every ratio comes from one run on one machine: the arms take turns, each in its own process, and the
median of the pairs is given. The limit beside a time is the work counted over the best rate of a
matrix product of the model's own size, measured in this run (`limit`). Peers are in `compare`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.job import Job
from benchmarks.launcher import must_run
from benchmarks.limit import Dimensions, count_work, gemm_rates
from benchmarks.prompts import Prompts, plan_prompts, shared_prompts, workload_prompts
from benchmarks.shapes import SHAPES, load_random, model_folder
from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.settings import EngineSettings

_SHAPE = "135M"
_VOCABULARY = int(SHAPES[_SHAPE]["vocab_size"])


def make_job(prompts: Prompts, dtype: str = "bfloat16", new: int = 32, **fields: Any) -> Job:
    """One batch, which `generate` is given all at once."""
    folder = str(model_folder(_SHAPE, dtype))
    return Job(folder, dtype, new, [prompts], rows_at_once=len(prompts), **fields)


def paired(job: Job, peer: str, pairs: int) -> dict[str, float]:
    """Medians of the seconds and of the pairwise ratio peer / ours."""
    times = [
        (must_run("prefix", job)["seconds"], must_run(peer, job)["seconds"]) for _ in range(pairs)
    ]
    return {
        "ours_s": statistics.median(t[0] for t in times),
        "peer_s": statistics.median(t[1] for t in times),
        "ratio": statistics.median(t[1] / t[0] for t in times),
        "pairs": pairs,
    }


def unique_tokens(workloads: Path) -> dict[str, float]:
    """Prefilled tokens / U on every workload file, cold, with a tiny model."""
    loaded = load_random("tiny", "float32")
    ratios = {}
    for path in sorted(workloads.glob("*.parquet")):
        plan = plan_prompts(workload_prompts(path), loaded.shape.vocabulary_size, 2)
        engine = PrefixEngine(loaded, EngineSettings())
        for completion in engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
            assert completion.error_type is None, completion.error_message
        ratios[path.stem] = engine.counters.prefilled_tokens / plan.tree.unique_tokens
    return ratios


def exactness() -> dict[str, float]:
    """fp32 rows of 64 x (512 + 32) whose 32 tokens equal those of `generate`, one at a time."""
    job = make_job(shared_prompts(64, 512, 32, _VOCABULARY), "float32")
    ours, plain = must_run("prefix", job), must_run("naive", job)
    same = [a == b for a, b in zip(ours["token_ids"], plain["token_ids"], strict=True)]
    return {"rows": len(same), "identical": sum(same), "ratio": plain["seconds"] / ours["seconds"]}


def budget() -> dict[str, float]:
    """Peak KV under a budget of a quarter of what the job would take; all rows must still come."""
    prompts = shared_prompts(64, 256, 32, _VOCABULARY)
    free = must_run("prefix", make_job(prompts, "float32", 8))
    allowed = free["counters"]["peak_kv_bytes"] // 4
    tight = must_run("prefix", make_job(prompts, "float32", 8, kv_budget=allowed))
    return {
        "budget_bytes": allowed,
        "peak_bytes": tight["counters"]["peak_kv_bytes"],
        "free_peak_bytes": free["counters"]["peak_kv_bytes"],
        "forwards": tight["counters"]["num_forwards"],
        "free_forwards": free["counters"]["num_forwards"],
        "same_tokens": tight["token_ids"] == free["token_ids"],
    }


def demo() -> dict[str, Any]:
    """The demo as a newcomer runs it: is the device busy, and is every audited row identical?"""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        command = [sys.executable, "-m", "pipeline", "demo", "-o", str(output)]
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds = time.perf_counter() - begin
        counters = json.loads((output / "run.json").read_text())["counters"]
        audit = json.loads((output / "audit" / "summary.json").read_text())
    return {
        "rows": counters["rows_ok"],
        "job_s": counters["wall_s"],
        "with_audit_and_report_s": seconds,
        "device_busy": counters["busy_s"] / counters["span_s"],
        "rows_audited": audit["rows_audited"],
        "rows_identical": audit["rows_exact"],
        "free_running": audit["free_running"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", type=Path, default=Path("../shared/workloads"))
    parser.add_argument(
        "--pairs", type=int, default=3, help="pairs of the 64-row job (minutes each)"
    )
    args = parser.parse_args()
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    report["prefilled_over_u"] = unique_tokens(args.workloads)
    print("prefilled / U            ", report["prefilled_over_u"])
    report["demo"] = demo()
    print("demo                     ", report["demo"])
    report["kv_budget"] = budget()
    print("peak KV under a budget   ", report["kv_budget"])
    report["fp32_exact"] = exactness()
    print("fp32, 64 x (512 + 32)    ", report["fp32_exact"])
    one, many = (make_job(shared_prompts(rows, 1024, 32, _VOCABULARY)) for rows in (1, 64))
    report["one_row"] = paired(one, "generate", 5)
    print("bf16, 1 x (1024 + 32)    ", report["one_row"])
    report["shared_64"] = paired(many, "generate", args.pairs)
    model = Dimensions.of(SHAPES[_SHAPE])
    rate = max(gemm_rates(model, torch.bfloat16).values())
    work = count_work(many.batches[0], many.new_tokens).flop(model)
    report["shared_64"] |= {"gemm_flop_per_s": rate, "gemm_limit_s": work / rate}
    print("bf16, 64 x (1024 + 32)   ", report["shared_64"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
