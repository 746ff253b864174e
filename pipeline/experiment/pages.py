"""The recycling experiment as Markdown and pictures. Knows its figures, not how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_LINES: Final[tuple[tuple[str, str, str], ...]] = (
    ("hits", "hits", "hits"),
    ("tokens reused", "reused_tokens", "count"),
    ("speedup, with cache", "speedup_with_cache", "percent"),
    ("speedup, without (misses)", "speedup_without", "percent"),
    ("token-identical hits", "identical", "identical"),
    ("token similarity", "token_similarity", "share"),
    ("output similarity", "output_similarity", "share"),
    ("right answers", "right_answers", "text"),
    ("prompt similarity", "prompt_similarity", "share"),
    ("latency, baseline", "baseline_s", "seconds"),
    ("latency, recycled", "latency_s", "seconds"),
)
_INK, _LEAF, _BARK, _STONE = "#24292f", "#2f7d4f", "#b3652b", "#8a949e"


def summary_page(summary: Mapping[str, Any]) -> str:
    """`summary.md`: the paper's table beside ours, model by model, then what depth makes of it."""
    parts = ["# Token recycling, measured again\n", f"{summary['how']}\n"]
    for model in summary["models"]:
        parts += [f"## {model['name']}\n", f"{model['note']}\n"]
        parts.append(_arm_table([summary["paper"], *model["arms"]]))
    parts += ["## Reuse depth\n", _depth_text(summary["depth"])]
    parts += ["## Nearest embedding and longest prefix\n", _neighbour_text(summary["neighbours"])]
    return "\n".join(parts)


def _arm_table(arms: Sequence[Row]) -> str:
    lines = ["| | " + " | ".join(arm["arm"] for arm in arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for label, name, form in _LINES:
        cells = [_cell(arm, name, form) for arm in arms]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(arm: Row, name: str, form: str) -> str:
    value = arm[name]
    if value is None:
        return "–"
    if form == "hits":
        return f"{value} of {arm['prompts']}"
    if form == "identical":
        return f"{value} of {arm['hits']}"
    if form == "seconds":
        return f"{value:.3f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"
    if form == "percent":
        return f"{value:.1f} %"
    return f"{value:.3f}" if form == "share" else f"{value}"


def _depth_text(depth: Mapping[str, Any]) -> str:
    lines = [
        f"{depth['model']}: prompt of {depth['prompt_tokens']} tokens, {depth['new_tokens']} new, "
        f"medians of {depth['repeats']}, 95 % bootstrap intervals.\n",
        "| k | state | latency | speedup S | faster by | predicted | load |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in depth["rows"]:
        load = row["load_cold_s"] if row["state"] == "cold" else row["load_s"]
        lines.append(
            f"| {row['depth']} | {row['state']} | {row['latency_s']:.3f} s "
            f"({row['latency_low_s']:.3f}–{row['latency_high_s']:.3f}) | "
            f"{row['speedup_percent']:.1f} % "
            f"({row['speedup_low']:.1f}–{row['speedup_high']:.1f}) | "
            f"{row['ratio']:.2f}x | {row['predicted_ratio']:.2f}x | {1000 * load:.1f} ms |"
        )
    deepest, k, sure = depth["deepest"], depth["break_even"], depth["least_sure_depth"] or "none"
    return "\n".join(lines) + (
        f"\n\nAt k = {deepest['depth']}: {deepest['ratio']:.2f}x measured, "
        f"{deepest['predicted_ratio']:.2f}x predicted ({deepest['off_percent']:+.1f} %). "
        f"Break-even depth k*: {k['warm']:.0f} tokens warm, {k['cold']:.0f} cold, "
        f"{k['embedding']:.0f} when a sentence embedding finds the candidate, by the parts; as a "
        f"whole, the least depth here that is faster beyond doubt: {sure}. "
        f"S = alpha k/m gives alpha = {depth['alpha']:.2f} (the paper: 1.2 to 1.5); only prefill "
        f"can be saved, which is {depth['alpha_bound']:.2f} of the time at these lengths.\n"
    )


def _neighbour_text(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['note']}\n",
        "| stored | nearest misses the longest | whole prefix stored | of these, nearest misses | "
        "tokens lost, any r | lost, r = k | search |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['stored']:,} | {row['misses']:.0%} | {row['whole_prefixes']:.0%} | "
            f"{row['whole_misses']:.0%} | {row['tokens_lost']:.0%} | "
            f"{row['tokens_lost_whole']:.0%} | {1000 * row['search_s']:.2f} ms |"
        )
    embed_ms = 1000 * found["rows"][-1]["embed_s"] if found["rows"] else 0.0
    return "\n".join(lines) + f"\n\nEmbedding one query takes {embed_ms:.1f} ms besides.\n"


def draw_recycling(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write depth.png and neighbours.png."""
    from matplotlib.figure import Figure

    depth = Figure(figsize=(12.6, 3.9), layout="constrained")
    for axes, draw in zip(
        depth.subplots(1, 3), (_draw_latency, _draw_speedup, _draw_alpha), strict=True
    ):
        draw(axes, summary["depth"])
    neighbours = Figure(figsize=(5.6, 3.9), layout="constrained")
    _draw_neighbours(neighbours.subplots(), summary["neighbours"]["rows"])
    return [_save(depth, folder / "depth.png"), _save(neighbours, folder / "neighbours.png")]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def _warm(depth: Mapping[str, Any]) -> list[Row]:
    return [row for row in depth["rows"] if row["state"] == "warm"]


def _draw_latency(axes: Axes, depth: Mapping[str, Any]) -> None:
    rows = _warm(depth)
    _with_intervals(axes, rows, "latency_s", ("latency_low_s", "latency_high_s"))
    k = [row["depth"] for row in rows]
    axes.plot(k, [row["predicted_s"] for row in rows], "--", color=_BARK, label="predicted")
    axes.axhline(rows[0]["baseline_s"], color=_STONE, lw=1, label="baseline")
    axes.set(xlabel="reuse depth k (tokens)", ylabel="latency (s)", title="latency")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _draw_speedup(axes: Axes, depth: Mapping[str, Any]) -> None:
    rows = _warm(depth)
    _with_intervals(axes, rows, "speedup_percent", ("speedup_low", "speedup_high"))
    axes.axhline(0, color=_STONE, lw=1)
    for (name, value), colour in zip(
        depth["break_even"].items(), (_LEAF, _STONE, _BARK), strict=True
    ):
        if value < depth["prompt_tokens"]:
            axes.axvline(value, color=colour, lw=1, ls=":", label=f"k* {name}: {value:.0f}")
    axes.set_xscale("symlog", linthresh=8)
    depths = [row["depth"] for row in rows]
    axes.set_xticks(depths, [str(depth) for depth in depths], rotation=60)
    axes.set(xlabel="reuse depth k (tokens)", ylabel="speedup S (%)", title="break-even")
    axes.legend(frameon=False, fontsize=8)


def _draw_alpha(axes: Axes, depth: Mapping[str, Any]) -> None:
    rows = _warm(depth)
    shares = [row["depth"] / row["prompt_tokens"] for row in rows]
    axes.plot(shares, [row["speedup_percent"] / 100 for row in rows], "o", color=_LEAF)
    axes.plot([0, 1], [0, depth["alpha"]], color=_LEAF, lw=1, label=f"alpha = {depth['alpha']:.2f}")
    axes.fill_between(
        [0, 1], [0, 1.2], [0, 1.5], color=_BARK, alpha=0.25, label="paper: 1.2 to 1.5"
    )
    axes.plot([0, 1], [0, 1], color=_STONE, lw=1, ls="--", label="all time is prefill")
    axes.set(xlabel="k / m", ylabel="S", title="S = alpha k/m", xlim=(0, 1), ylim=(-0.1, 1.5))
    axes.legend(frameon=False, fontsize=8)


def _with_intervals(axes: Axes, rows: Sequence[Row], name: str, bounds: tuple[str, str]) -> None:
    values = [row[name] for row in rows]
    low = [max(row[name] - row[bounds[0]], 0.0) for row in rows]
    high = [max(row[bounds[1]] - row[name], 0.0) for row in rows]
    k = [row["depth"] for row in rows]
    axes.errorbar(k, values, [low, high], fmt="o-", ms=4, capsize=3, color=_LEAF, label="measured")
    axes.grid(alpha=0.25)


def _draw_neighbours(axes: Axes, rows: Sequence[Row]) -> None:
    stored = [row["stored"] for row in rows]
    lines = (
        ("misses", "nearest is not the longest prefix", _LEAF, "o-"),
        ("tokens_lost", "reusable tokens lost, any r", _BARK, "s--"),
        ("tokens_lost_whole", "reusable tokens lost, r = k", _INK, "^:"),
    )
    for name, label, colour, style in lines:
        values = [100 * row[name] for row in rows]
        axes.plot(stored, values, style, color=colour, ms=4, label=label)
    axes.set(xscale="log", xlabel="prompts in the store", ylabel="%", ylim=(0, 102))
    axes.set_title("nearest embedding against longest prefix")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
