"""How much of N workers a job can use: `python -m benchmarks.fleet`, every workload file, 2 to 64.

Efficiency = predicted cost of the whole job on one worker / (workers x seconds until the last one
ends), in tokens, replicated prefixes included; simulated by the product's own dispatch, see
`fleet_simulation`. With and without an error of the prediction, for shards that were cut
beforehand, for the queue alone, and for the queue with shares. A file that has not ten rows for
each worker is too small for so many; so each is shown ten times as large as well: ten copies that
share nothing with each other. Writes results/fleet.jsonl and results/fleet.md.

`--measure` is something else: two real workers of one thread against one, on this machine through
Ray. Last line: one JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from benchmarks.fleet_simulation import Setting, noise_by_piece, simulate, static_makespan
from benchmarks.scratch import ROOT
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.shards import Costs
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

_SEEDS = 5
_VOCABULARY = 1 << 15
_HEAD = """# How much of N workers a job can use

Written by `python -m benchmarks.fleet`; do not edit. Simulated, in predicted cost (tokens; a new
token counts {decode_weight:g}), {rows_at_once} rows begun at once. Efficiency: cost of the job on
one worker over workers x time of the last one, so replicated prefixes count as loss. *shards*: cut
beforehand (`--num-shards`); *queue*: longest piece first; *stealing*: what `--executor ray` does.
Noise: the real cost of each quarter of a worker's rows is lognormal around the predicted one, sigma
{sigma:g}, mean of {seeds} draws. *limit*: no dispatch reaches more, for whoever computes a row
computes what all rows share, and the longest row is one worker's. x10: ten copies of the file that
share nothing with each other.

"""
_COLUMNS = ("file", "rows", "workers", "rows each", "shards", "queue", "stealing", "limit",
            "computed twice", "shards, noise", "queue, noise", "stealing, noise")  # fmt: skip


def load(path: Path, copies: int) -> Plan:
    """The plan of a workload file, rows shuffled, each with its own limit of new tokens."""
    frame = pl.read_parquet(path, columns=["prompt", "max_new_tokens"]).sample(
        fraction=1.0, shuffle=True, seed=0
    )
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    encoded = tokenizer.encode_batch(frame["prompt"].to_list(), add_special_tokens=False)
    rows = [
        [token + copy * _VOCABULARY for token in e.ids] for copy in range(copies) for e in encoded
    ]
    most = frame["max_new_tokens"].to_list() * copies
    limits = sorted(set(most))
    params = tuple(SamplingParams(limit) for limit in limits)
    chosen = np.array([limits.index(limit) for limit in most], np.int64)
    names = [str(row) for row in range(len(rows))]
    return build_plan(TokenTable.from_lists(rows), names, params, chosen)


def efficiencies(plan: Plan, number: int, args: argparse.Namespace) -> dict[str, float]:
    """By way of dealing out, without and with noise."""
    found: dict[str, list[float]] = {}

    def note(name: str, setting: Setting, seconds: float) -> None:
        found.setdefault(name, []).append(setting.seconds_alone() / (number * seconds))

    for sigma, seeds, suffix in ((0.0, 1, ""), (args.sigma, _SEEDS, "_noise")):
        for seed in range(seeds):
            noise = noise_by_piece(plan, number, sigma, seed)
            setting = Setting(plan, noise, number, args.decode_weight, args.rows_at_once)
            note("shards" + suffix, setting, static_makespan(setting)[0])
            note("queue" + suffix, setting, simulate(setting, steals=False)[0])
            seconds, computed = simulate(setting)
            note("stealing" + suffix, setting, seconds)
            if not sigma:
                found["computed_twice"] = [computed / setting.seconds_alone() - 1]
    return {name: statistics.mean(values) for name, values in found.items()}


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each file, size and number of workers."""
    for path in sorted(args.workloads.glob("*.parquet")):
        if "messages" in path.name:
            continue  # the same conversations as mt_bench
        for copies in (1, 10):
            plan = load(path, copies)
            for number in args.workers:
                rows = len(plan.table)
                head = {"file": path.stem, "copies": copies, "rows": rows, "workers": number}
                limit = limit_of(plan, number, args.decode_weight)
                yield {
                    **head, "rows_each": rows / number, "limit": limit,
                    **efficiencies(plan, number, args),
                }  # fmt: skip


def limit_of(plan: Plan, num_workers: int, decode_weight: float) -> float:
    """The most of linear that any dispatch of whole rows can reach."""
    costs = Costs(plan, decode_weight)
    total = costs.whole(0, len(plan.sequences))
    in_all = int(costs.shared[1:].min(initial=total))
    longest = float((plan.prompt_lengths + plan.max_new_tokens * decode_weight).max())
    return total / (num_workers * max(in_all + (total - in_all) / num_workers, longest))


def row(line: dict[str, Any]) -> str:
    """Of the table; bold where stealing does not reach 0.9."""
    name = line["file"] + (f" x{line['copies']}" if line["copies"] > 1 else "")
    cells = [name, f"{line['rows']:,}", str(line["workers"]), f"{line['rows_each']:.0f}"]
    for key in ("shards", "queue", "stealing"):
        cells.append(_cell(line[key], key == "stealing"))
    cells += [f"{line['limit']:.3f}", f"{line['computed_twice']:.1%}"]
    for key in ("shards_noise", "queue_noise", "stealing_noise"):
        cells.append(_cell(line[key], key == "stealing_noise"))
    return _cells(cells)


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _cell(value: float, is_ours: bool) -> str:
    return f"**{value:.3f}**" if is_ours and value < 0.9 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    workloads = ROOT.parent / "shared" / "workloads"
    parser.add_argument("--workloads", type=Path, default=workloads)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--decode-weight", type=float, default=1.0)
    parser.add_argument("--rows-at-once", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--shape", default="135M")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.measure:
        from benchmarks.fleet_measured import measure

        print(
            json.dumps(measure(args.workloads / "squad_passages.parquet", args.shape, args.rounds))
        )
        return
    found = []
    for line in lines(args):
        found.append(line)
        print(row(line), end="", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    rule = ("---", *("---:",) * (len(_COLUMNS) - 1))
    head = _HEAD.format(**vars(args), seeds=_SEEDS) + _cells(_COLUMNS) + _cells(rule)
    (args.results / "fleet.md").write_text(head + "".join(map(row, found)))
    (args.results / "fleet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    print(json.dumps({"least_stealing": min(line["stealing"] for line in found)}))


if __name__ == "__main__":
    main()
