"""Conversations carried from turn to turn: `python -m benchmarks.conversations`. Last line: JSON.

Random ids on random weights, so that these are times and counts, and say nothing of answers. Every
arm is a process of its own; the next turn of an arm that sends the history again holds the answers
that it gave itself. What is asked, in parts:

| part | |
|---|---|
| within | all of a history stays: carried, or sent again each turn, to us and to others |
| past | beyond a window: `sink-recent`, `window`, or the history cut on the left |
| spill | with room for a few conversations: KV saved to the host, or computed again |

Tokens computed by carrying must be those that are new, each once, or this fails.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.job import Job
from benchmarks.launcher import run_arm
from benchmarks.limit import Dimensions, Work, count_work, gemm_rates
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.shapes import SHAPES
from benchmarks.turns import draw_turns
from pipeline.plan.conversations import join_ids

PARTS = ("within", "past", "spill")
OTHERS = ("prefix", "vllm", "vllm_all_cores")
"""`prefix`: ourselves, without carrying."""
_TO_SHARE = 0.9  # of the window, that a conversation may keep


@dataclass(frozen=True)
class Case:
    """One arm on one job. `computes_new`: every token once, and no other."""

    name: str
    arm: str
    job: Job
    computes_new: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.set_defaults(time_limit_s=7200.0)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--new", type=int, default=40, help="tokens of the user a turn")
    parser.add_argument("--window", type=int, default=768, help="of the part `past`")
    parser.add_argument("--cache-gib", type=int, default=4, help="KV room of every arm")
    parser.add_argument(
        "--one-by-one", type=int, default=2, help="conversations of `naive`; 0: none"
    )
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=OTHERS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    setup = setup_of(args := parser.parse_args())
    cases = [case for part in args.parts for case in make_cases(part, setup, args)]
    report: dict[str, Any] = {
        "shape": setup.shape, "dtype": setup.dtype, "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("conversations", "turns", "new", "window")},
        "answer": setup.new_tokens,
    }  # fmt: skip
    model = Dimensions.of(SHAPES[setup.shape])
    rate = max(gemm_rates(model, getattr(torch, setup.dtype)).values())
    report["limit_s"] = least_work(args, setup).flop(model) / rate
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for turn in range(setup.repeats):
        for case in cases if turn % 2 == 0 else cases[::-1]:
            found[case.name].append(measure(case, setup.time_limit_s))
            print(f"{case.name:24}", json.dumps(found[case.name][-1]), flush=True)
    report["cases"] = {name: median_of(rounds) for name, rounds in found.items()}
    report["ratios"] = ratios(report["cases"])
    print(json.dumps(report))


def make_cases(part: str, setup: Setup, args: argparse.Namespace) -> list[Case]:
    """Of one part."""
    rounds = draw_turns(args.conversations, args.turns, args.new, setup.vocabulary_size)
    job = Job(
        setup.model(), setup.dtype, setup.new_tokens, rounds, cache_gib=args.cache_gib,
        kv_budget=args.cache_gib << 30, is_conversation=True,
    )  # fmt: skip
    if part == "within":
        few = replace(job, batches=[one[: args.one_by_one] for one in rounds])
        naive = [Case("naive, a few", "naive", few)] if args.one_by_one else []
        again = [Case(f"{arm}, again", arm, job) for arm in args.others]
        return [Case("carry", "carry", job, True), *again, *naive]
    if part == "spill":
        tight = replace(job, kv_budget=tight_budget(setup, args))
        return [
            Case("carry, spilled", "carry", replace(tight, spill_memory=None)),
            Case("carry, computed again", "carry", replace(tight, spill_memory=0)),
        ]
    cut = replace(job, most_tokens=args.window - setup.new_tokens)
    budget = {"budget_tokens": int(_TO_SHARE * args.window), "window": args.window}
    kept = [
        Case(
            f"carry, {evictor}", "carry", replace(job, eviction={"evictor": evictor} | budget), True
        )
        for evictor in ("sink-recent", "window")
    ]
    return [*kept, *(Case(f"{arm}, cut", arm, cut) for arm in args.others)]


def tight_budget(setup: Setup, args: argparse.Namespace) -> int:
    """Bytes for the whole of a quarter of the conversations."""
    shape = SHAPES[setup.shape]
    width = shape["hidden_size"] // shape["num_attention_heads"]
    token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width
    token *= torch.finfo(getattr(torch, setup.dtype)).bits // 8
    most = args.turns * (args.new + setup.new_tokens)
    return int(token * most * max(2, args.conversations // 4))


def least_work(args: argparse.Namespace, setup: Setup) -> Work:
    """Of carrying everything: each token is computed once, and looks at all before it."""
    turn = args.new + setup.new_tokens
    total = args.turns * turn - 1  # the last token is chosen and never fed
    count = args.conversations
    return Work(
        prefilled_tokens=count * args.turns * args.new,
        decoded_tokens=count * (args.turns * setup.new_tokens - 1),
        chosen_tokens=count * args.turns * setup.new_tokens,
        pairs=count * total * (total + 1) // 2,
    )


def measure(case: Case, limit_s: float) -> dict[str, Any]:
    """Seconds and counts of one run, or why there are none. Raises AssertionError where tokens were
    computed that are not new."""
    outcome = run_arm(case.arm, case.job, limit_s)
    rounds = case.job.batches
    turns = len(rounds) * len(rounds[0])
    if outcome.failure:
        return {"failure": outcome.failure, "turns_done": len(outcome.answers) * len(rounds[0])}
    seconds = sum(answer["seconds"] for answer in outcome.answers)
    counters = [answer["counters"] or {} for answer in outcome.answers]
    found: dict[str, Any] = {
        "seconds": seconds,
        "turns_per_s": turns / seconds,
        "computed": computed_tokens(case, outcome.answers),
        "engine": outcome.answers[0]["engine"],
    }
    if case.arm == "carry":
        found |= carried(counters[0], turns * case.job.new_tokens, seconds)
    if case.computes_new:
        expected = new_tokens(rounds, outcome.answers[0]["token_ids"])
        assert found["computed"] == expected, (case.name, found["computed"], expected)
    return found


def computed_tokens(case: Case, answers: list[dict[str, Any]]) -> int:
    """Prompt tokens that an arm computed, those that it computed again included."""
    total = 0
    sent = [0] * len(case.job.batches[0])
    for number, answer in enumerate(answers):
        counters = answer["counters"] or {}
        if "prefilled_tokens" in counters:
            total += counters["prefilled_tokens"] + counters["recomputed_tokens"]
        elif "cached_tokens" in counters:
            total += counters["prompt_tokens"] - counters["cached_tokens"]
        else:  # `naive` knows no cache
            sent = [n + len(ids) for n, ids in zip(sent, case.job.batches[number], strict=True)]
            total += sum(min(n, case.job.most_tokens or n) for n in sent)
            sent = [n + case.job.new_tokens for n in sent]
    return total


def carried(counters: dict[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
    """What only the engine that carries knows; `tokens` were generated."""
    return {
        "decode_us_per_token": 1e6 * counters["decode_s"] / tokens,
        "recomputed": counters["recomputed_tokens"],
        "peak_kv_mb": counters["peak_kv_bytes"] / 1e6,
        "evictions": counters["evictions"],
        "most_runs": counters["most_runs"],
        "eviction_s": counters["eviction_s"],
        "eviction_share": counters["eviction_s"] / seconds,
    }


def new_tokens(rounds: list[list[list[int]]], answers: list[list[int]]) -> int:
    """Distinct ones of the first prompts, and what each later turn feeds: the last token of the
    answer before, and its own."""
    count = len(rounds[0])
    fed = [
        len(join_ids(answers[(turn - 1) * count + c][-1], np.array(ids)))
        for turn, one in enumerate(rounds)
        for c, ids in enumerate(one)
        if turn
    ]
    return count_work(rounds[0], 1).prefilled_tokens + sum(fed)


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle by time; one that failed, if any did."""
    failed = [one for one in rounds if "failure" in one]
    if failed:
        return failed[0]
    return sorted(rounds, key=lambda one: one["seconds"])[len(rounds) // 2]


def ratios(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Pairs that are asked for, where both were measured; above 1 the first is better, but for
    steps, where it is how much more the first takes."""
    found: dict[str, float] = {}
    for first, ending in (("carry", " again"), ("carry, sink-recent", " cut")):
        for second in cases:
            if second.endswith(ending) and not second.startswith("carry"):
                found |= _speed(cases, first, second)
    if _are_there(cases, "carry, sink-recent", "carry, window"):
        steps = (cases[f"carry, {way}"]["decode_us_per_token"] for way in ("sink-recent", "window"))
        found["step, sink-recent : window"] = next(steps) / next(steps)
    if _are_there(cases, "carry, spilled", "carry, computed again"):
        spilled, again = (
            cases[f"carry, {way}"]["seconds"] for way in ("spilled", "computed again")
        )
        found["seconds, computed again : spilled"] = again / spilled
    return found


def _speed(cases: dict[str, dict[str, Any]], first: str, second: str) -> dict[str, float]:
    if not _are_there(cases, first, second):
        return {}
    a, b = cases[first], cases[second]
    return {
        f"turns/s, {first} : {second}": a["turns_per_s"] / b["turns_per_s"],
        f"tokens, {second} : {first}": b["computed"] / a["computed"],
    }


def _are_there(cases: dict[str, dict[str, Any]], *names: str) -> bool:
    return all(name in cases and "failure" not in cases[name] for name in names)


if __name__ == "__main__":
    main()
