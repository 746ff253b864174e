"""Lines of a study as one entry for each (workload, order, arm): medians over the rounds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """`line`: one of the runs, for what is the same in all; `seconds`: None where there is no time;
    `ratio`: its seconds over ours on the rows as given, in the same round; above 1 we are faster.
    """

    line: Line
    seconds: float | None
    rounds: int
    ratio: float | None
    limit_s: float

    @property
    def achieved(self) -> float | None:
        """Share of the limit that was reached."""
        return None if self.seconds is None else self.limit_s / self.seconds


def read_lines(path: Path) -> list[Line]:
    """All lines of a study; none if there was none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(lines: list[Line]) -> list[Entry]:
    """In the order in which arms first came up. Limits by the best rate of the whole study."""
    runs = [line for line in lines if line["kind"] == "run"]
    rates = [r for m in lines if m["kind"] == "machine" for r in m["gemm_flop_per_s"].values()]
    by_key: dict[tuple[str, str, str], list[Line]] = {}
    for run in runs:
        by_key.setdefault((run["workload"], run["order"], run["arm"]), []).append(run)
    return [_entry(group, by_key, max(rates)) for group in by_key.values()]


def _entry(group: list[Line], by_key: dict[tuple[str, str, str], list[Line]], rate: float) -> Entry:
    timed = [run for run in group if run["seconds"] is not None]
    first = (timed or group)[0]
    same_round = {
        run["repeat"]: run["seconds"]
        for run in by_key.get((first["workload"], "given", "prefix"), [])
        if run["seconds"] is not None
    }
    ratios = [
        run["seconds"] / same_round[run["repeat"]] for run in timed if run["repeat"] in same_round
    ]
    return Entry(
        line=first,
        seconds=statistics.median(run["seconds"] for run in timed) if timed else None,
        rounds=len(timed),
        ratio=statistics.median(ratios) if ratios else None,
        limit_s=first["work_flop"] / rate,
    )
