"""The README's figures of trust: `python -m benchmarks.trust` (or `make trust`); half an hour.

Audits of all of 600 prompts of the demo on its model, in float32, in strict mode and in bfloat16;
what replaying one row in a hundred costs (gsm8k_8shot on random weights: seconds, no quality); then
strict mode's price, the tortures and the fuzzer, each a command of its own. Every part leaves its
JSON in the scratch folder, so that `--keep` runs only what is missing. Writes results/trust.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scratch import ROOT, scratch
from benchmarks.shapes import model_folder
from pipeline.audit.auditing import audit_run
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings

Found = dict[str, Any]
_WORKLOADS = ROOT.parent / "shared" / "workloads"


def audit(prompts: Path, settings: AuditSettings, **flat: Any) -> Found:
    """The audit's summary of a job, and the job's seconds as `wall_s`."""
    folder = scratch("trust") / "run"
    shutil.rmtree(folder, ignore_errors=True)
    outcome = run_job(str(prompts), folder, JobSettings.from_flat(flat))
    audit_run(Location(folder), settings)
    summary: Found = json.loads((folder / "audit" / "summary.json").read_text())
    return summary | {"wall_s": outcome.counters["wall_s"], "rows": outcome.counters["rows_in"]}


def audit_demo(**flat: Any) -> Found:
    """Every row that ran, 64 of them by all arms: no figure hangs on which rows are drawn."""
    model = {"model": str(ROOT / "data" / "demo_model"), "limit": 600}
    settings = AuditSettings(audit_sample="600", audit_arms=64)
    return audit(ROOT / "data" / "prompts.parquet", settings, **model, **flat)


def audit_one_percent() -> Found:
    """The replay alone; the row of each group that an audit adds is one here."""
    model = model_folder("135M", "bfloat16", _WORKLOADS / "tokenizer.json")
    settings = AuditSettings(audit_sample="1%", audit_arms=0, audit_free_running=0)
    prompts = _WORKLOADS / "gsm8k_8shot.parquet"
    return audit(prompts, settings, model=str(model), max_new_tokens=32)


def strict_cost() -> Found:
    """The last line of `benchmarks.strict`."""
    lines = _run("benchmarks.strict", "--repeats", "5").splitlines()
    found: Found = json.loads(lines[-1])
    return found


def torture() -> Found:
    """What `tests.torture` writes."""
    path = scratch("trust") / "torture-raw.json"
    _run("tests.torture", "--json", str(path))
    found: Found = json.loads(path.read_text())
    return found


def fuzz(files: int = 2000) -> Found:
    """The counts that `tests.storage.fuzz` prints."""
    counts, _, _ = _run("tests.storage.fuzz", str(files)).partition(";")
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", counts)}


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


PARTS: dict[str, Callable[[], Found]] = {
    "fp32": lambda: audit_demo(dtype="float32"),
    "strict": lambda: audit_demo(dtype="float32", fidelity="strict"),
    "bf16": lambda: audit_demo(dtype="bfloat16"),
    "one_percent": audit_one_percent,
    "strict_cost": strict_cost,
    "torture": torture,
    "fuzz": fuzz,
}


def rows_of_table(found: dict[str, Found]) -> list[tuple[str, str]]:
    """(what, figure)."""
    rows = []
    for name, what in (("fp32", "float32"), ("bf16", "bfloat16")):
        summary, arms = found[name], found[name]["arms"]
        classes = ", ".join(f"{n} {c}" for c, n in summary["classes"].items() if n)
        rows += [
            (
                f"{what}, demo model: rows token for token those of full prefill",
                f"{summary['rows_exact']} of {summary['rows_audited']} ({classes}); at most "
                f"{summary['bound_95']:.2%} of all rows differ (95 %), over groups "
                f"{summary['bound_95_groups']:.2%}",
            ),
            (
                f"{what}: token-exact with reuse, and batched without (the noise floor)",
                f"{arms['product']['rows_exact']} and {arms['batched']['rows_exact']} of "
                f"{arms['product']['rows']}",
            ),
            (
                f"{what}: planted faults that changed an answer, caught",
                f"{summary['faults']['caught']} of {summary['faults']['changed_an_answer']} "
                f"({summary['faults']['planted']} planted)",
            ),
        ]
    strict, cost, one = found["strict"], found["strict_cost"], found["one_percent"]
    ratios = {name: case for name, case in cost.items() if isinstance(case, dict)}
    swept, killed = found["torture"]["swept"].values(), found["torture"]["killed"].values()
    return [
        *rows,
        (
            "strict mode: rows with the bits that they have alone",
            f"{strict['strict']['rows_same_bits']} of {strict['strict']['rows']}",
        ),
        (
            "strict mode's time over the default's (CPU time)",
            "; ".join(f"{n}: {c['ratio']:.2f} ({c['cpu_ratio']:.2f})" for n, c in ratios.items()),
        ),
        (
            f"replay of {one['rows_audited']} of {one['rows']:.0f} rows over the job's time",
            f"{one['replay_seconds'] / one['wall_s']:.1%} "
            f"({one['replay_seconds']:.2f} of {one['wall_s']:.1f} s, gsm8k_8shot, bfloat16)",
        ),
        (
            "file operations that failed, killed, lost power",
            f"{sum(f['faults'] for f in swept)}, {sum(f['kills'] for f in swept)}, "
            f"{sum(f['cuts'] for f in swept)}; after each the job came to all its rows",
        ),
        (
            "random kill -9 of whole jobs",
            f"{sum(f['kills'] for f in killed)} survived; "
            f"{sum(f['rows_lost'] for f in killed)} rows lost, "
            f"{sum(f['rows_twice'] for f in killed)} twice",
        ),
        ("damaged Parquet files read", ", ".join(f"{v} {n}" for n, v in found["fuzz"].items())),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="what an earlier call found")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    folder = scratch("trust")
    folder.mkdir(exist_ok=True)
    found = {}
    for name, measure in PARTS.items():
        path = folder / f"{name}.json"
        if not (args.keep and path.exists()):
            path.write_text(json.dumps(measure(), indent=1))
        found[name] = json.loads(path.read_text())
    table = ["| | |", "|---|---|", *(f"| {what} | {said} |" for what, said in rows_of_table(found))]
    (args.results / "trust.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
