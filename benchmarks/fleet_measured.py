"""Two real workers against one, each of one thread, fed by Ray on this machine.

Seconds from the first order to the last answer: engines are loaded and have run a few rows before.
Every round is one worker, two, and two jobs of one worker each side by side, every job in a process
and a cluster of its own. Those two share nothing but the machine: the seconds that they take longer
than one alone are what no division of the work can win back.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prompts import plan_prompts, shared_prompts, workload_prompts
from benchmarks.shapes import SHAPES, model_folder
from pipeline.engine.base import RunControl
from pipeline.plan.plan import Plan
from pipeline.settings import JobSettings

_NEW_TOKENS = 32
_MOST_ROWS = 400


def measure(path: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Medians; `efficiency` of two workers: seconds of one / (2 x seconds of two); `limit`: seconds
    of one / those of one beside another."""
    model_folder(shape, "bfloat16")  # written once, by this process
    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        one, two = (_run_apart(path, shape, workers) for workers in (1, 2))
        with ThreadPoolExecutor(2) as pool:
            beside = list(pool.map(lambda _: _run_apart(path, shape, 1), range(2)))
        for run in (one, two, *beside):
            print(run, flush=True)
        alone_s, beside_s = one["seconds"], statistics.mean(run["seconds"] for run in beside)
        rates.append((alone_s / (2 * two["seconds"]), alone_s / beside_s))
    efficiency, limit = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "rows": two["rows"], "one_s": one["seconds"], "two_s": two["seconds"],
        "efficiency": efficiency, "limit": limit, "of_limit": efficiency / limit,
        "replicated_tokens": two["replicated_tokens"], "rounds": rounds, "cores": os.cpu_count(),
    }  # fmt: skip


def _run_apart(path: Path, shape: str, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cr", dir="/tmp") as short:  # Ray's sockets
        environment = {"RAY_TMPDIR": short, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fleet_measured", str(path), shape, str(workers)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def run(path: Path, shape: str, workers: int) -> dict[str, Any]:
    """One measurement in this process."""
    import ray

    from pipeline.engine.load import make_engine
    from pipeline.executor.fleet import Fleet
    from pipeline.executor.ray_crew import RayCrew

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    folder = str(model_folder(shape, "bfloat16"))
    settings = JobSettings.from_flat({"model": folder, "executor": "ray", "num_workers": workers})
    vocabulary = int(SHAPES[shape]["vocab_size"])
    plan = plan_prompts(workload_prompts(path)[:_MOST_ROWS], vocabulary, _NEW_TOKENS)
    fleet = Fleet(RayCrew(settings, make_engine, 1.0))
    warm_up = plan_prompts(shared_prompts(16, 64, 16, vocabulary, seed=9), vocabulary, 4)
    while len(fleet.staff.ready) < workers:
        _answer(fleet, warm_up)
    _answer(fleet, warm_up)
    begin = time.perf_counter()
    answers = _answer(fleet, plan)
    seconds = time.perf_counter() - begin
    counters = fleet.counters
    fleet.close()
    ray.shutdown()
    return {
        "workers": workers, "rows": len(answers), "seconds": seconds,
        "prefilled_tokens": counters.prefilled_tokens,
        "replicated_tokens": counters.replicated_tokens,
        "busy": counters.busy_s / counters.span_s,
    }  # fmt: skip


def _answer(fleet: Any, plan: Plan) -> tuple[tuple[int, ...], ...]:
    everything = np.arange(len(plan.sequences))
    completions = list(fleet.generate(plan, everything, RunControl()))
    return tuple(c.token_ids for c in sorted(completions, key=lambda c: c.sequence))


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
