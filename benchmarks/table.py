"""The results as Markdown: `python -m benchmarks.table [RESULTS]` writes peers.md from the lines.

What is slower than a peer is in the table like everything else, in bold, and listed below it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.machine import cpu_kind
from benchmarks.setup import RESULTS
from benchmarks.summary import Entry, Line, read_lines, summarise

PLOT = "break_even.png"
_TOLERANCE = 0.97  # of our own time: nearer is no difference on a shared machine
_EPILOGUE = """\
*seconds*: from "engine made, weights loaded, prompts in memory" to "all tokens are there"; median
of the rounds. *start-up*: imports, loading, compiling and one warm-up of 8 other ids, not in the
seconds. *against ours*: its seconds over those of coppice on the rows as given, in the same round;
above 1 coppice is faster, **bold** where the peer is. *limit*: work counted (each distinct prompt
token once) over the best matrix product measured here; nothing reaches 1. *same tokens*: share of
positions with our token; in bfloat16 near-ties fall either way and what follows differs, so it is
information and no test. Greedy, exact number of new tokens, random weights, caches cold.
"""


def write_results(results: Path) -> None:
    """Write peers.md from whatever lines there are."""
    cases, grid = read_lines(results / "cases.jsonl"), read_lines(results / "grid.jsonl")
    beside = read_lines(results / "beside.jsonl")
    parts = ["# Against its peers\n\nWritten by `make bench-peers`; do not edit.\n"]
    if any(line["kind"] == "run" for line in cases):
        entries = summarise(cases)
        parts += [describe(cases), case_table(entries), slower_list(entries), _EPILOGUE]
    if any(line["kind"] == "run" for line in beside):
        entries = summarise(beside)
        parts += ["## Beside a busy process\n", describe(beside), case_table(entries)]
        parts.append(slower_list(entries))
    if any(line["kind"] == "run" for line in grid):
        entries = summarise(grid)
        parts += [
            "## p shared tokens × G rows\n\nEvery row has 32 tokens of its own.\n",
            describe(grid),
            grid_table(entries),
            slower_list(entries),
        ]
        if (results / PLOT).exists():
            parts.append(f"![break-even over G for several p]({PLOT})\n")
    (results / "peers.md").write_text("\n".join(parts))


def describe(lines: list[Line]) -> str:
    """What ran where, in a paragraph."""
    machine = next(line for line in lines if line["kind"] == "machine")
    run = next(line for line in lines if line["kind"] == "run")
    engines = sorted({line["engine"] for line in lines if line.get("engine")})
    rates = [r for m in lines if m["kind"] == "machine" for r in m["gemm_flop_per_s"].values()]
    instructions = ", ".join(machine["instructions"])
    return (
        f"{machine['date']}, commit {machine['commit']}. {machine['cores']} cores of "
        f"{machine['processor']} ({instructions}), {run['shape']} Llama shape, "
        f"{run['dtype']}, {run['new_tokens']} new tokens a row, best matrix product "
        f"{max(rates) / 1e9:.0f} GFLOP/s. Engines: {'; '.join(engines)}.\n"
    )


def case_table(entries: list[Entry]) -> str:
    """One line for each arm and order, under each workload."""
    head = ("workload", "arm", "order", "seconds", "against ours", "of the limit", "start-up s",
            "same tokens")  # fmt: skip
    lines = []
    for entry in sorted(entries, key=lambda e: _first_seen(entries, e)):
        line = entry.line
        rounds = f" ({entry.rounds})" if entry.rounds > 1 else ""
        same = (line.get("agreement") or {}).get("tokens")
        lines.append(
            (
                f"{line['workload']}, {line['rows']} rows, {line['prompt_tokens']:,} tokens, "
                f"{line['unique_tokens']:,} distinct",
                ARMS[line["arm"]].label,
                line["order"],
                _seconds(entry) + rounds,
                "" if entry.seconds is None else _ratio(entry),
                _achieved(entry),
                "" if entry.seconds is None else f"{line['startup_s']:.1f}",
                "" if same is None else f"{100 * same:.1f} %",
            )
        )
    return _markdown(head, _blank_repeats(lines))


def grid_table(entries: list[Entry]) -> str:
    """One line for each (p, G): our seconds, and every other arm's over them."""
    arms = list(dict.fromkeys(e.line["arm"] for e in entries if e.line["arm"] != "prefix"))
    cells: dict[tuple[int, int], dict[str, Entry]] = {}
    for entry in entries:
        point = entry.line["shared"], entry.line["rows"]
        cells.setdefault(point, {})[entry.line["arm"]] = entry
    head = ("p", "G", "coppice s", "of the limit", *(f"{ARMS[a].label} / ours" for a in arms))
    lines = []
    for (p, rows), by_arm in sorted(cells.items()):
        ours = by_arm.get("prefix")
        lines.append(
            (
                str(p),
                str(rows),
                _seconds(ours) if ours else "",
                _achieved(ours) if ours else "",
                *(_ratio(by_arm[a]) if a in by_arm else "" for a in arms),
            )
        )
    return _markdown(head, lines)


def slower_list(entries: list[Entry]) -> str:
    """Where another arm is faster than ours, worst first."""
    slower = [e for e in entries if e.ratio is not None and e.ratio < _TOLERANCE]
    slower = [e for e in slower if e.line["arm"] != "prefix"]
    if not slower:
        return "Slower than another arm (by more than 3 %): nowhere in this run.\n"
    worst = sorted(slower, key=lambda e: e.ratio or 0.0)
    items = [
        f"- {e.line['workload']} ({e.line['order']}): {ARMS[e.line['arm']].label} takes "
        f"{e.ratio:.2f} of our time"
        for e in worst
    ]
    return "Slower than another arm (by more than 3 %):\n\n" + "\n".join(items) + "\n"


def _first_seen(entries: list[Entry], entry: Entry) -> int:
    """Workloads stay together though rounds mix them."""
    return [e.line["workload"] for e in entries].index(entry.line["workload"])


def _ratio(entry: Entry) -> str:
    if entry.ratio is None:
        return "" if entry.seconds is not None else str(entry.line["failure"])
    text = f"{entry.ratio:.2f}" if entry.ratio < 10 else f"{entry.ratio:.0f}"
    return f"**{text}**" if entry.ratio < _TOLERANCE else text


def _seconds(entry: Entry) -> str:
    """Or why there are none."""
    if entry.seconds is None:
        return str(entry.line["failure"])
    return f"{entry.seconds:.2f}" if entry.seconds < 10 else f"{entry.seconds:.1f}"


def _achieved(entry: Entry) -> str:
    return "" if entry.achieved is None else f"{entry.achieved:.2f}"


def _blank_repeats(lines: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The first column is written once."""
    firsts = [None, *(line[0] for line in lines)]
    return [
        ("" if line[0] == above else line[0], *line[1:])
        for line, above in zip(lines, firsts, strict=False)
    ]


def _markdown(head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


if __name__ == "__main__":
    write_results(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / cpu_kind())
