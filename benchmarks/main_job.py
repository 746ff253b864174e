"""The main job's numbers: `python -m benchmarks.main_job` (or `make bench`). Last line: one JSON.

Every ratio comes from one run on one machine: the arms take turns, each in its own process, and the
median of the pairs is given. The limit beside a time is the work counted (2 x weights x tokens)
over the rate of a plain matrix product of the model's own size, measured in this run.
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

from benchmarks.shapes import load_random, plan_prompts, workload_prompts
from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.settings import EngineSettings

_BODY_135M, _HEAD_135M = 106_203_456, 28_311_552  # weights; the head only where a token is chosen


def run_arm(arm: str, **options: Any) -> dict[str, Any]:
    """Run one arm in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.arm", arm]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def paired(ours: dict[str, Any], peer: str, pairs: int, **options: Any) -> dict[str, float]:
    """Medians of the seconds and of the pairwise ratio peer / ours."""
    times = [
        (run_arm("prefix", **options, **ours)["seconds"], run_arm(peer, **options)["seconds"])
        for _ in range(pairs)
    ]
    return {
        "ours_s": statistics.median(t[0] for t in times),
        "peer_s": statistics.median(t[1] for t in times),
        "ratio": statistics.median(t[1] / t[0] for t in times),
        "pairs": pairs,
    }


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of 2048 tokens with a 576 x 1536 weight, best of 20."""
    left, right = torch.randn(2048, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        torch.matmul(left, right)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048 * 576 * 1536 / best


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
    job = {"dtype": "float32", "rows": 64, "shared": 512, "own": 32}
    ours, plain = run_arm("prefix", **job), run_arm("naive", **job)
    same = [a == b for a, b in zip(ours["token_ids"], plain["token_ids"], strict=True)]
    return {"rows": len(same), "identical": sum(same), "ratio": plain["seconds"] / ours["seconds"]}


def budget() -> dict[str, float]:
    """Peak KV under a budget of a quarter of what the job would take; all rows must still come."""
    job = {"dtype": "float32", "rows": 64, "shared": 256, "own": 32, "new": 8}
    free = run_arm("prefix", **job)
    allowed = free["counters"]["peak_kv_bytes"] // 4
    tight = run_arm("prefix", **job, kv_budget=allowed)
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
    report["one_row"] = paired({}, "generate", 5, rows=1)
    print("bf16, 1 x (1024 + 32)    ", report["one_row"])
    report["shared_64"] = paired({}, "generate", args.pairs)
    fed, chosen = 1024 + 64 * 32 + 64 * 31, 64 * 32
    work = 2 * (_BODY_135M * fed + _HEAD_135M * chosen)
    report["shared_64"]["gemm_limit_s"] = work / gemm_rate(torch.bfloat16)
    print("bf16, 64 x (1024 + 32)   ", report["shared_64"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
