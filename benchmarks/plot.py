"""The break-even plot: `python -m benchmarks.plot [RESULTS]`. Ratios over G, a line for each p."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.arms import ARMS
from benchmarks.summary import Entry, read_lines, summarise
from benchmarks.table import PLOT, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATIOS = [step * 10.0**power for power in range(-2, 4) for step in (1, 2, 5)]  # axis labels

Curve = list[tuple[int, float]]
"""(G, ratio), G ascending."""


def curves_of(entries: list[Entry], arm: str) -> dict[int, Curve]:
    """By p, the times of `arm` over ours."""
    curves: dict[int, Curve] = {}
    for entry in entries:
        if entry.line["arm"] == arm and entry.ratio is not None:
            curves.setdefault(entry.line["shared"], []).append((entry.line["rows"], entry.ratio))
    return {p: sorted(curve) for p, curve in sorted(curves.items())}


def crossings(curve: Curve) -> list[float]:
    """Every G at which the ratio passes 1, straight between measurements on logarithmic axes."""
    found = []
    for (g, ratio), (next_g, next_ratio) in itertools.pairwise(curve):
        low, high = math.log(ratio), math.log(next_ratio)
        if (low < 0) != (high < 0):
            found.append(math.exp(math.log(g) + low / (low - high) * math.log(next_g / g)))
    return found


def draw_break_even(results: Path) -> None:
    """Write break_even.png, one panel for each arm of the grid, and the table that shows it."""
    from matplotlib.figure import Figure

    entries = summarise(read_lines(results / "grid.jsonl"))
    arms = list(dict.fromkeys(e.line["arm"] for e in entries if e.line["arm"] != "prefix"))
    if not arms:
        return
    figure = Figure(figsize=(5.2 * len(arms), 4.2), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False)[0]
    for axes, arm in zip(panels, arms, strict=True):
        _draw(axes, curves_of(entries, arm), ARMS[arm].label)
    figure.savefig(results / PLOT, dpi=110)
    write_results(results)


def _draw(axes: Axes, curves: dict[int, Curve], label: str) -> None:
    from matplotlib import colormaps

    for number, (p, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.9 * number / max(1, len(curves) - 1))
        axes.plot(*zip(*curve, strict=True), "o-", ms=3, lw=1.4, color=colour, label=f"p = {p:,}")
        for rows in crossings(curve):
            axes.plot(rows, 1.0, "X", ms=10, color=colour, mec="white")
            axes.annotate(f"{rows:.2g}", (rows, 1.0), (4, 6), textcoords="offset points", size=8)
    axes.axhline(1.0, color="0.3", lw=1, ls="--")
    axes.set(xscale="log", yscale="log", xlabel="G: rows below the shared prefix")
    ticks = sorted({rows for curve in curves.values() for rows, _ in curve})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    low, high = min(axes.get_ylim()[0], 0.7), max(axes.get_ylim()[1], 1.5)
    axes.set_ylim(low, high)
    ratios = [r for r in _RATIOS if low <= r <= high]
    axes.set_yticks(ratios, [f"{r:g}" for r in ratios])
    axes.minorticks_off()
    axes.set_ylabel("its time / ours (above 1: coppice is faster)")
    axes.set_title(f"against {label}".replace("`", ""))
    axes.grid(alpha=0.25)
    if curves:
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    draw_break_even(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results"))
