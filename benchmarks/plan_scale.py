"""How planning grows: `python -m benchmarks.plan_scale [--rows 10000 100000 1000000 10000000]`.

Token ids are given (random, with known sharing); a process of its own plans them and reports its
time and the most memory it held. Writes results/plan_scale.jsonl and results/plan_scale.png.

The rows look like a nightly file: `GROUPS` instructions of 200 tokens, below each many documents of
100 tokens that five rows ask about, and 30 tokens of each row's own. U is known from that.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.scratch import ROOT
from pipeline.forms import parse_size
from pipeline.plan.plan import build_plan
from pipeline.plan.summary import KVLimits, hash_plan, summarise
from pipeline.plan.token_table import TokenFile, TokenTable, narrowest_dtype
from pipeline.records import SamplingParams

_INSTRUCTION, _DOCUMENT, _OWN = 200, 100, 30
_GROUPS, _ROWS_A_DOCUMENT = 20, 5
_VOCABULARY = 32_768
_BATCH = 5_000


def make_table(num_rows: int, seed: int = 0) -> tuple[TokenTable, int]:
    """(the table, in a temporary file, its rows shuffled; U)."""
    draw = np.random.default_rng(seed)
    num_documents = -(-num_rows // _ROWS_A_DOCUMENT)
    instructions = draw.integers(0, _VOCABULARY, (_GROUPS, _INSTRUCTION), np.uint16)
    order = draw.permutation(num_rows)
    file = TokenFile(tempfile.TemporaryFile(), narrowest_dtype(_VOCABULARY))
    for low in range(0, num_rows, _BATCH):
        rows = order[low : low + _BATCH]
        document = rows % num_documents
        ids = np.empty((len(rows), _INSTRUCTION + _DOCUMENT + _OWN), np.uint16)
        ids[:, :_INSTRUCTION] = instructions[document % _GROUPS]
        # A document's ids are a function of its number: nothing as large as the table is held.
        ids[:, _INSTRUCTION:-_OWN] = _mix(document[:, None] * 131 + np.arange(_DOCUMENT))
        ids[:, -_OWN:] = _mix(rows[:, None] * 37 + np.arange(_OWN) + 2**40)
        file.append(ids.ravel(), np.full(len(rows), ids.shape[1], np.int64))
    unique = min(_GROUPS, num_documents) * _INSTRUCTION + num_documents * _DOCUMENT
    return file.finish(), unique + num_rows * _OWN


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Numbers that look random, by the finaliser of splitmix64."""
    x = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) % np.uint64(_VOCABULARY)


def measure(num_rows: int, sort_bytes: int) -> dict[str, object]:
    """Plan once in this process."""
    begin = time.perf_counter()
    table, unique = make_table(num_rows)
    made = time.perf_counter()
    ids = [""] * num_rows
    plan = build_plan(
        table, ids, (SamplingParams(),), np.zeros(num_rows, np.int32), sort_bytes=sort_bytes
    )
    planned = time.perf_counter()
    summary = summarise(plan, ids, KVLimits(None, 256, None))
    peak = _peak_rss()
    assert summary.unique_tokens <= unique, (summary.unique_tokens, unique)
    return {
        "rows": num_rows,
        "tokens": summary.prompt_tokens,
        "unique_tokens": summary.unique_tokens,
        "unique_tokens_by_construction": unique,
        "nodes": plan.tree.num_nodes,
        "sort_bytes": sort_bytes,
        "make_s": made - begin,
        "plan_s": planned - made,
        "summary_s": time.perf_counter() - planned,
        "peak_rss_bytes": peak,
        "plan_hash": hash_plan(plan, ids),
    }


def _peak_rss() -> int:
    """Bytes. Not `ru_maxrss`: that begins at what the parent held."""
    said = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None, "the kernel does not tell"
    return int(said[1]) * 1024


def draw_plot(lines: list[dict[str, float]], path: Path) -> None:
    """Seconds and memory over rows, both logarithmic, beside a line of slope one."""
    from matplotlib.figure import Figure

    rows = [line["rows"] for line in lines]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (("plan_s", 1.0, "seconds"), ("peak_rss_bytes", 2.0**30, "GiB at most"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        values = [line[key] / unit for line in lines]
        axes.loglog(rows, values, "o-")
        axes.loglog(rows, [values[-1] * r / rows[-1] for r in rows], ":", label="slope 1")
        axes.set(xlabel="rows of 330 tokens", ylabel=label)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--sort-memory", type=parse_size, default=1 << 30)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--here", action="store_true", help="in this process; used by itself")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.rows[0], args.sort_memory)))
        return
    lines = []
    for num_rows in args.rows:
        command = [sys.executable, "-m", "benchmarks.plan_scale", "--here", "--rows", str(num_rows)]
        command += ["--sort-memory", str(args.sort_memory)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        lines.append(json.loads(done.stdout))
        print(done.stdout, end="", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "plan_scale.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    draw_plot(lines, args.results / "plan_scale.png")


if __name__ == "__main__":
    main()
