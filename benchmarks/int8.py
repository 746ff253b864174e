"""What `--weights int8` gains: `python -m benchmarks.int8`. Last line: one JSON document.

The same weights in bfloat16 and rounded to int8 take turns in one process, on 64 rows x (1,024
shared + 32 own), rows of gsm8k_8shot, and 100 prompts that share nothing, 32 new tokens a row; then
int8 in float32, default and strict. Medians of the pairs, beside the bytes of the weights.

`--beside vllm vllm_all_cores`: these engines on the same int8 weights (`shapes.int8_folder`), each
in a process of its own, one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.job import Job
from benchmarks.launcher import must_run_all
from benchmarks.prompts import (
    Prompts,
    distinct_prompts,
    plan_prompts,
    shared_prompts,
    workload_prompts,
)
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.shapes import int8_folder, load_random
from benchmarks.strict import seconds
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.int8 import hold_in_int8
from pipeline.model.model import LoadedModel
from pipeline.plan.plan import Plan
from pipeline.settings import EngineSettings


def load(setup: Setup, dtype: str, *, is_int8: bool) -> LoadedModel:
    """The setup's shape."""
    loaded = load_random(setup.shape, dtype)
    if is_int8:
        hold_in_int8(loaded.model)
    return loaded


def weight_bytes(loaded: LoadedModel) -> int:
    """Of all parameters."""
    return sum(p.nbytes for p in loaded.model.parameters())


def compare(engines: dict[str, PrefixEngine], plan: Plan, repeats: int) -> dict[str, float]:
    """Median seconds of each engine, and of the first over the second in each pair."""
    first, second = engines
    pairs = []
    for turn in range(repeats):
        order = [first, second] if turn % 2 else [second, first]
        pairs.append({name: seconds(engines[name], plan)[0] for name in order})
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in engines}
    return medians | {"ratio": statistics.median(pair[first] / pair[second] for pair in pairs)}


def beside(arm: str, setup: Setup, cases: dict[str, Prompts]) -> dict[str, float]:
    """Seconds of a peer on the same int8 weights, by case. Raises RuntimeError if it gives none."""
    folder = str(int8_folder(setup.shape, setup.workloads / "tokenizer.json"))
    job = Job(folder, "bfloat16", setup.new_tokens, batches=list(cases.values()))
    answers = must_run_all(arm, job, setup.time_limit_s)
    return dict(zip(cases, (answer["seconds"] for answer in answers), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.set_defaults(shape="360M", repeats=3)
    parser.add_argument("--rows", type=int, default=100, help="of gsm8k_8shot")
    parser.add_argument("--no-strict", action="store_true", help="the first comparison alone")
    parser.add_argument("--beside", nargs="*", default=[], help="engines: vllm vllm_all_cores")
    setup = setup_of(args := parser.parse_args())
    size = setup.vocabulary_size
    cases = {
        "64 x (1,024 + 32)": shared_prompts(64, 1024, 32, size),
        "gsm8k_8shot": workload_prompts(setup.workloads / "gsm8k_8shot.parquet")[: args.rows],
        "nothing shared": distinct_prompts(100, (100, 141), size),
    }
    plans = {name: plan_prompts(prompts, size, setup.new_tokens) for name, prompts in cases.items()}
    plain, rounded = (load(setup, "bfloat16", is_int8=is_int8) for is_int8 in (False, True))
    modes = {
        "bfloat16": {
            "bfloat16": PrefixEngine(plain, EngineSettings()),
            "int8": PrefixEngine(rounded, EngineSettings()),
        }
    }
    if not args.no_strict:
        exact = load(setup, "float32", is_int8=True)
        modes["strict"] = {
            "strict": PrefixEngine(exact, EngineSettings(fidelity="strict")),
            "default": PrefixEngine(exact, EngineSettings()),
        }
    report: dict[str, Any] = {"shape": setup.shape, "repeats": setup.repeats}
    report["weight_bytes"] = {"bfloat16": weight_bytes(plain), "int8": weight_bytes(rounded)}
    for mode, engines in modes.items():
        for engine in engines.values():
            seconds(engine, plan_prompts(cases["nothing shared"][:2], size, 2))
        for name, plan in plans.items():
            report[f"{mode}, {name}"] = compare(engines, plan, setup.repeats)
            print(f"{mode:9} {name:18}", report[f"{mode}, {name}"], flush=True)
    for arm in args.beside:
        theirs = beside(arm, setup, cases)
        report[arm] = {
            name: {"int8": taken, "ratio": taken / report[f"bfloat16, {name}"]["int8"]}
            for name, taken in theirs.items()
        }
        print(f"{arm:28}", report[arm], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
