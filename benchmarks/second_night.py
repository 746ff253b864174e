"""What a night gains by the KV of the one before: `python -m benchmarks.second_night`.

Two jobs: the demo's in float32, and rows of gsm8k_8shot on random weights of the bench shape. Each
is run without a store, on an empty one, and again on the same one, in turns, each in a process of
its own; medians are given. The texts must be the same in float32, or this fails. All is counted:
opening the store, lookups, loads, checks, writing. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from benchmarks.scratch import ROOT, scratch
from benchmarks.setup import Setup, add_options, setup_of

_ARMS = ("without", "first", "second")
_FIGURES = ("wall_s", "prefilled_tokens", "loaded_tokens", "load_s", "prefill_s", "unique_tokens")


class Job(NamedTuple):
    """Input and flags of `coppice run`; `is_exact`: float32, so that texts must agree."""

    name: str
    source: Path
    flags: list[str]
    is_exact: bool


def jobs(setup: Setup, rows: int) -> list[Job]:
    """Both; the second one only where the workloads are."""
    demo = ["--model", str(ROOT / "data" / "demo_model"), "--dtype", "float32"]
    found = [Job("demo", ROOT / "data" / "prompts.parquet", demo, True)]
    workload = setup.workloads / "gsm8k_8shot.parquet"
    if workload.exists():
        prompts = scratch("second_night") / workload.name
        prompts.parent.mkdir(exist_ok=True)
        columns = ["id", "prompt"]  # and not the length that the file asks for
        pl.read_parquet(workload, columns=columns).head(rows).write_parquet(prompts)
        flags = ["--model", setup.model(), "--dtype", setup.dtype, "--ignore-eos"]
        flags += ["--max-new-tokens", str(setup.new_tokens)]
        found.append(Job(f"gsm8k_8shot, {rows} rows", prompts, flags, setup.dtype == "float32"))
    return found


def run_arm(place: Path, arm: str, job: Job) -> dict[str, float]:
    """Counters of one run; `first` begins with an empty store, `second` with what it left."""
    store, output = place / "store", place / arm
    if arm == "first":
        shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    kept = [] if arm == "without" else ["--kv-store", str(store)]
    command = [sys.executable, "-m", "pipeline", "run", str(job.source), "-o", str(output)]
    command += [*job.flags, *kept, "--progress", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    counters: dict[str, float] = json.loads((output / "run.json").read_text())["counters"]
    return {name: counters[name] for name in _FIGURES}


def differing_rows(place: Path) -> int:
    """Rows whose text is not the same in all arms."""
    texts = [
        pl.read_parquet(place / arm / "data" / "*.parquet").sort("row_index")["generated_text"]
        for arm in _ARMS
    ]
    return int(((texts[0] != texts[1]) | (texts[0] != texts[2])).sum())


def compare(job: Job, repeats: int) -> dict[str, Any]:
    """Medians of every figure by arm, over `repeats` rounds. Raises RuntimeError."""
    place = scratch("second_night") / job.name.split(",")[0]
    rounds = [{arm: run_arm(place, arm, job) for arm in _ARMS} for _ in range(repeats)]
    differing = differing_rows(place)
    if differing and job.is_exact:
        raise RuntimeError(f"{job.name}: {differing} rows have another text with the store")
    found: dict[str, Any] = {
        arm: {name: statistics.median(r[arm][name] for r in rounds) for name in _FIGURES}
        for arm in _ARMS
    }
    stored = sum(file.stat().st_size for file in (place / "store").rglob("*.safetensors"))
    return found | {"differing_rows": differing, "store_bytes": stored, "rounds": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--rows", type=int, default=100)
    parser.set_defaults(repeats=3)
    args = parser.parse_args()
    results = {}
    for job in jobs(setup_of(args), args.rows):
        found = results[job.name] = compare(job, args.repeats)
        for arm in _ARMS:
            of = found[arm]
            print(
                f"{job.name:24} {arm:8} {of['wall_s']:6.2f} s, computed "
                f"{of['prefilled_tokens']:9,.0f} tokens, loaded {of['loaded_tokens']:9,.0f} "
                f"in {of['load_s']:.2f} s",
                flush=True,
            )
        print(f"{job.name:24} {found['differing_rows']} rows differ", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
