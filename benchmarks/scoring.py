"""Scores of short continuations: `python -m benchmarks.scoring`. Last line: one JSON document.

Requests with the lengths and the sharing of real tasks (`scoring_tasks`), on random weights, so
that these are times and counts and say nothing of quality. Ours and the `hf` model of
lm-evaluation-harness take turns in one process; what its `vllm` model asks goes to vLLM in a
process of its own, on the first documents of each task, of which ours has a turn as well. Tokens
computed by ours must be the distinct ones, and positions read those that are asked for, or this
fails; with `--dtype float32` every score must be within 1e-4 nats of `hf`. Last, the peak of memory
with 4 choices a row and with 4,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.limit import Dimensions, count_work, gemm_rates
from benchmarks.scoring_arms import Arm, Ours, Score, Scores, Theirs, ask_vllm
from benchmarks.scoring_memory import peaks
from benchmarks.scoring_tasks import LAYOUTS, Task, Words, make_task
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.shapes import SHAPES
from kvcoppice.evaluation.evaluator import Request

MOST_NATS = 1e-4
_HEAD = ("task", "requests", "U", "positions", "coppice s", "limit s", "hf s", "vllm s",
         "hf / U", "vllm / U", "hf : coppice", "vllm : coppice")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.set_defaults(time_limit_s=7200.0)
    parser.add_argument("--tasks", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the documents of a subject")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16], help="hf tries them")
    parser.add_argument("--vllm-documents", type=int, default=10, help="of each task; 0: none")
    parser.add_argument("--cache-gib", type=int, default=4, help="KV room of vLLM")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    setup = setup_of(args := parser.parse_args())
    words = Words(setup.workloads)
    tasks = [make_task(name, words, args.share) for name in args.tasks]
    report: dict[str, Any] = {
        "shape": setup.shape, "dtype": setup.dtype, "threads": torch.get_num_threads(),
    }  # fmt: skip
    report["tasks"] = measure(setup, tasks, args)
    if not args.no_memory:
        report["memory"] = peaks(setup)
    print(table(report["tasks"]))
    print(json.dumps(report))


def measure(setup: Setup, tasks: Sequence[Task], args: argparse.Namespace) -> dict[str, Any]:
    """By task the counts, the seconds and the ratios."""
    model = Dimensions.of(SHAPES[setup.shape])
    rate = max(gemm_rates(model, getattr(torch, setup.dtype)).values())
    ours = Ours(setup)
    theirs = Theirs(setup, args.batches) if args.batches else None
    ours.score(tasks[0].first(2).requests)
    found = {}
    for task in tasks:
        requests = task.requests
        arms: dict[str, Arm] = {"coppice": ours} | ({"hf": theirs} if theirs else {})
        found[task.name] = compare(task.name, arms, requests, setup)
        found[task.name]["limit_s"] = limit_s(requests, model, rate, found[task.name])
        found[task.name]["sent_tokens"] = task.sent_tokens
        if theirs is not None:
            found[task.name]["hf"]["batch"] = theirs.batch_of(requests)
    if args.vllm_documents:
        few = [task.first(args.vllm_documents) for task in tasks]
        add_vllm(found, few, ours, ask_vllm(setup, few, args.cache_gib))
    return found


def compare(
    name: str, arms: dict[str, Arm], requests: Sequence[Request], setup: Setup
) -> dict[str, Any]:
    """Medians of rounds in which every arm has its turn, the order changing."""
    rounds: dict[str, list[Scores]] = {arm: [] for arm in arms}
    for turn in range(setup.repeats):
        for arm in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            rounds[arm].append(arms[arm].score(requests))
            last = rounds[arm][-1]
            print(f"{name:25} {arm:8} {last.computed:9,} {last.seconds:8.2f} s", flush=True)
    first = rounds["coppice"][0]
    report: dict[str, Any] = {
        "requests": len(requests), "unique_tokens": first.computed, "positions": first.positions,
    }  # fmt: skip
    for arm, some in rounds.items():
        seconds = statistics.median(one.seconds for one in some)
        computed = some[0].computed
        report[arm] = {"seconds": seconds, "computed": computed, "of_u": computed / first.computed}
    if "hf" in rounds:
        pairs = zip(rounds["coppice"], rounds["hf"], strict=True)
        report["hf"]["ratio"] = statistics.median(b.seconds / a.seconds for a, b in pairs)
        report["hf"]["nats"] = worst_nats(first.scores, rounds["hf"][0].scores)
        assert setup.dtype != "float32" or report["hf"]["nats"] <= MOST_NATS, report
    return report


def add_vllm(
    found: dict[str, Any], few: Sequence[Task], ours: Ours, answers: dict[str, dict[str, Any]]
) -> None:
    """What vLLM says of some documents beside what ours does with the same."""
    for task in few:
        line = answers.get(task.name)
        if line is None:
            found[task.name]["vllm"] = {"failure": answers.get("failure", {}).get("said")}
            continue
        own = ours.score(task.requests)
        scores = [(total, is_greedy) for total, is_greedy in line["scores"]]
        found[task.name]["vllm"] = {
            "documents": len(task.documents), "engine": line["engine"],
            "seconds": line["seconds"], "coppice_seconds": own.seconds,
            "ratio": line["seconds"] / own.seconds, "computed": line["computed"],
            "of_u": line["computed"] / own.computed, "nats": worst_nats(own.scores, scores),
        }  # fmt: skip
        print(f"{task.name:25} vllm     {line['computed']:9,} {line['seconds']:8.2f} s", flush=True)


def worst_nats(ours: Sequence[Score], theirs: Sequence[Score]) -> float:
    return max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))


def limit_s(
    requests: Sequence[Request], model: Dimensions, rate: float, counted: dict[str, Any]
) -> float:
    """Each distinct token once, the head where it is read, at the rate of a matrix product."""
    fed = [[*r.context.tolist(), *r.continuation[:-1].tolist()] for r in requests]
    work = replace(count_work(fed, 1), chosen_tokens=counted["positions"])
    assert work.prefilled_tokens == counted["unique_tokens"], counted
    return work.flop(model) / rate


def table(tasks: dict[str, Any]) -> str:
    """As Markdown; of vLLM the seconds of its few documents stand beside ours on the same."""
    lines = [_HEAD, ("---", *("---:",) * (len(_HEAD) - 1))]
    for name, task in tasks.items():
        hf, vllm = task.get("hf", {}), task.get("vllm", {})
        at = f"{vllm['seconds']:.1f} ({vllm['coppice_seconds']:.2f})" if "seconds" in vllm else ""
        lines.append((
            name, f"{task['requests']:,}", f"{task['unique_tokens']:,}", f"{task['positions']:,}",
            f"{task['coppice']['seconds']:.2f}", f"{task['limit_s']:.2f}",
            _number(hf, "seconds"), at, _number(hf, "of_u"), _number(vllm, "of_u"),
            _number(hf, "ratio"), _number(vllm, "ratio"),
        ))  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(of: dict[str, Any], name: str) -> str:
    return f"{of[name]:.1f}" if name in of else ""


if __name__ == "__main__":
    main()
