"""What busy neighbours cost: `python -m benchmarks.neighbours`. Last line: one JSON document.

A neighbour is a process that never sleeps. In each round every case runs on the quiet machine, and
beside the neighbours as the engine comes and with one thread. Medians over the rounds, in seconds,
and how many times the quiet run of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.prompts import distinct_prompts, plan_prompts, shared_prompts
from benchmarks.setup import add_options, setup_of
from benchmarks.shapes import load_random
from benchmarks.strict import seconds
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.threads import use_threads
from pipeline.settings import EngineSettings

_MODES = ("quiet", "as it comes", "one thread")


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many busy processes."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(number)]
    try:
        time.sleep(1.0)  # until they are
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--neighbours", type=int, default=1)
    setup = setup_of(args := parser.parse_args())
    loaded, most = load_random(setup.shape, setup.dtype), torch.get_num_threads()
    size = setup.vocabulary_size
    cases = {
        "2 rows": distinct_prompts(2, (100, 141), size),
        "64 x (1,024 + 32)": shared_prompts(64, 1024, 32, size),
        "nothing shared, 100 rows": distinct_prompts(100, (100, 141), size),
    }
    plans = {name: plan_prompts(case, size, setup.new_tokens) for name, case in cases.items()}
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in _MODES} for name in plans}
    for _ in range(setup.repeats):
        for mode in _MODES:
            settings = EngineSettings(threads=1 if mode == "one thread" else None)
            use_threads(settings if settings.threads else EngineSettings(threads=most))
            engine = PrefixEngine(loaded, settings)
            seconds(engine, plans["2 rows"])
            with neighbours(0 if mode == "quiet" else args.neighbours):
                for name, plan in plans.items():
                    found[name][mode].append(seconds(engine, plan)[0])
    report: dict[str, Any] = {"threads": most, "neighbours": args.neighbours, "shape": setup.shape}
    for name, modes in found.items():
        report[name] = {mode: statistics.median(times) for mode, times in modes.items()}
        ratios = {
            mode: statistics.median(np.divide(times, modes["quiet"]).tolist())
            for mode, times in modes.items()
        }
        report[name]["times the quiet run"] = ratios
        said = (f"{mode} {report[name][mode]:.2f} s ({ratios[mode]:.2f} x)" for mode in _MODES)
        print(f"{name:26}", ", ".join(said), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
