"""`make torture`: all operations, both codes, hundreds of kills; prints one line of figures.

A quarter of an hour on two cores. Ends with an error at the first thing that is not right.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.tiny_job import write_model, write_tokenizer
from tests.torture.audit_bench import AuditBench, finished_run
from tests.torture.disk import CODES
from tests.torture.job import Bench, RunBench
from tests.torture.kills import Job, kill_jobs, tiny_job
from tests.torture.sweep import Figures, record, sweep_errors, sweep_kills, sweep_power_cuts
from tests.torture.victim import ROOT, Server

ALL = range(10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--kills", type=int, default=220, help="of whole commands, at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("coppice").setLevel(logging.ERROR)  # locks are taken over all the time
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        figures = torture(Path(folder), arguments.kills, arguments.seed)
    figures["seconds"] = round(time.monotonic() - begin)
    print(line(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def torture(base: Path, kills: int, seed: int) -> dict[str, Any]:
    """All of it."""
    server = Server()
    tokenizer, model = write_tokenizer(base / "tokenizer"), write_model(base / "model")
    run = RunBench(base / "job", tokenizer)
    ordered = RunBench(base / "job", tokenizer, (("preserve_order", True),))
    audit = AuditBench(base / "audit", finished_run(base / "finished", model))
    swept = {
        "run": sweep(run, server),
        "run --preserve-order": sweep(ordered, server),
        "audit and report": sweep(audit, server),
        "power cuts": report(sweep_power_cuts, run, record(run), [None, *range(seed, seed + 3)]),
    }
    luck = random.Random(seed)
    tiny_base, demo_base = base / "kills-tiny", base / "kills-demo"  # both name their runs alike
    for folder in (tiny_base, demo_base):
        folder.mkdir()
    demo = Job(demo_base, ROOT / "data" / "prompts.parquet", ROOT / "data" / "demo_model", 600, 60)
    jobs = {
        "tiny model": kill_jobs(tiny_job(tiny_base, model, 400), server, kills * 3 // 4, luck),
        "demo model": kill_jobs(demo, server, kills // 4, luck),
    }
    return {
        "swept": {name: asdict(figures) for name, figures in swept.items()},
        "killed": {name: asdict(figures) for name, figures in jobs.items()},
    }


def sweep(bench: Bench, server: Server) -> Figures:
    """Every operation fails in both ways and for as long as the disk stays full, then kills."""
    total = Figures()
    for code, lasts in [(code, False) for code in CODES] + [(errno.ENOSPC, True)]:
        figures = report(sweep_errors, bench, code, lasts, ALL)
        total = Figures(figures.operations, total.faults + figures.faults)
    for when in ("before", "halfway", "after"):
        figures = report(sweep_kills, bench, server, when, ALL)
        total.kills += figures.kills
        total.largest_waste = max(total.largest_waste, figures.largest_waste)
    return total


def report(torment: Callable[..., Figures], *arguments: Any) -> Figures:
    """Do it and say so: this takes a while."""
    begin = time.monotonic()
    figures = torment(*arguments)
    print(f"{torment.__name__}: {figures}, {time.monotonic() - begin:.0f} s", flush=True)
    return figures


def line(figures: dict[str, Any]) -> str:
    """The figures of all tortures together."""
    swept, killed = figures["swept"].values(), figures["killed"].values()
    return (
        f"{sum(f['faults'] for f in swept)} operations failed, "
        f"{sum(f['kills'] for f in swept)} killed, {sum(f['cuts'] for f in swept)} power cuts; "
        f"{sum(f['kills'] for f in killed)} random kill -9 of {sum(f['jobs'] for f in killed)} "
        f"jobs: {sum(f['rows_lost'] for f in killed)} rows lost, "
        f"{sum(f['rows_twice'] for f in killed)} twice, at most "
        f"{max(f['largest_waste_parts'] for f in killed):.2f} parts computed again after a kill; "
        f"{figures['seconds']} s"
    )


if __name__ == "__main__":
    main()
