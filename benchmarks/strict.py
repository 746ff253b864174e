"""What `--fidelity strict` costs: `python -m benchmarks.strict`. Last line: one JSON document.

The 135M shape in float32, 32 new tokens a row: 64 rows x (512 shared + 32 own), and rows of
gsm8k_8shot. Default and strict take turns in one process; the medians of the pairs are given, by
the clock and by the CPU seconds of all threads, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.prompts import Prompts, plan_prompts, shared_prompts, workload_prompts
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.shapes import load_random
from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.strict_probe import strict_probe
from pipeline.plan.plan import Plan
from pipeline.settings import EngineSettings

_MODES = ("default", "strict")


def engines(setup: Setup) -> dict[str, PrefixEngine]:
    """Both on the same weights."""
    loaded = load_random(setup.shape, "float32")
    return {
        mode: PrefixEngine(loaded, EngineSettings.model_validate({"fidelity": mode}))
        for mode in _MODES
    }


def seconds(engine: PrefixEngine, plan: Plan) -> tuple[float, float]:
    """(by the clock, of the CPU) of one job with cold caches."""
    clock, cpu = time.perf_counter(), time.process_time()
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        assert completion.error_type is None, completion.error_message
    return time.perf_counter() - clock, time.process_time() - cpu


def compare(by_mode: dict[str, PrefixEngine], prompts: Prompts, setup: Setup) -> dict[str, float]:
    """Medians over `setup.repeats` pairs; the mode that goes first changes from pair to pair."""
    plan = plan_prompts(prompts, setup.vocabulary_size, setup.new_tokens)
    for engine in by_mode.values():
        seconds(engine, plan_prompts(prompts[:2], setup.vocabulary_size, 2))
    pairs = []
    for turn in range(setup.repeats):
        order = _MODES if turn % 2 else _MODES[::-1]
        pairs.append({mode: seconds(by_mode[mode], plan) for mode in order})
    return {
        "pairs": len(pairs),
        "default_s": statistics.median(p["default"][0] for p in pairs),
        "strict_s": statistics.median(p["strict"][0] for p in pairs),
        "ratio": statistics.median(p["strict"][0] / p["default"][0] for p in pairs),
        "cpu_ratio": statistics.median(p["strict"][1] / p["default"][1] for p in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=100, help="of gsm8k_8shot")
    setup = setup_of(args := parser.parse_args())
    torch.set_num_threads(args.threads)
    by_mode = engines(setup)
    begin = time.perf_counter()
    ways = strict_probe(by_mode["strict"])
    report: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__, "ways": ways}
    report["probe_s"] = time.perf_counter() - begin
    cases = {
        "64 x (512 + 32)": shared_prompts(64, 512, 32, setup.vocabulary_size),
        "gsm8k_8shot": workload_prompts(setup.workloads / "gsm8k_8shot.parquet")[: args.rows],
    }
    for name, prompts in cases.items():
        report[name] = compare(by_mode, prompts, setup)
        print(f"{name:18}", report[name], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
