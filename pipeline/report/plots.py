"""Pictures of a run as inline SVG. Knows numbers and labels; no files and no page.

What a picture shows is said in its alternative text as well, in words and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.report.conversations import ConversationHealth
from pipeline.report.formats import count, decimal
from pipeline.report.metrics import RunMetrics
from pipeline.report.svg import BAD, BARK, LEAF, STONE, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_tokens(metrics: RunMetrics) -> str:
    """Prompt tokens by reuse depth, computed and saved: where the saving comes from."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "reuse depth (tokens)", "prompt tokens")
        labels = [b.label for b in metrics.depths]
        computed = [b.computed_tokens for b in metrics.depths]
        cached = [b.cached_tokens for b in metrics.depths]
        axes.bar(labels, computed, width=0.62, color=BARK, label="computed")
        axes.bar(labels, cached, width=0.62, bottom=computed, color=LEAF, label="saved")
        _legend_above(axes)

    said = (
        f"{b.label}: {count(b.computed_tokens)} and {count(b.cached_tokens)}"
        for b in metrics.depths
    )
    label = "Prompt tokens computed and saved, by reuse depth. "
    return to_svg("tokens", label + "; ".join(said), draw)


def draw_latency(metrics: RunMetrics) -> str:
    """Latency without the queue by reuse depth: median, and 10th to 90th percentile."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "reuse depth (tokens)", "latency without queue (s)")
        for index, depth in enumerate(metrics.depths):
            axes.vlines(index, depth.service_p10_s, depth.service_p90_s, LEAF, lw=7, alpha=0.45)
            axes.plot(index, depth.service_p50_s, "o", color=LEAF, ms=7)
        axes.set_xticks(range(len(metrics.depths)), [b.label for b in metrics.depths])
        axes.set_xlim(-0.6, max(len(metrics.depths), 1) - 0.4)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])  # room for the mark of the highest

    said = (f"{b.label}: median {decimal(b.service_p50_s)} s" for b in metrics.depths)
    return to_svg("latency", "Latency without queue, by reuse depth. " + "; ".join(said), draw)


def draw_group_sizes(metrics: RunMetrics) -> str:
    """Rows by the size of their prefix group."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "rows in the group", "rows")
        labels = [b.label for b in metrics.group_sizes]
        colours = [STONE if label == "1" else LEAF for label in labels]
        bars = axes.bar(labels, [b.rows for b in metrics.group_sizes], width=0.62, color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7.5)

    said = (f"{b.label}: {count(b.rows)}" for b in metrics.group_sizes)
    return to_svg("groups", "Rows by the size of their prefix group. " + "; ".join(said), draw)


def draw_window(by_window: Sequence[tuple[str, int]]) -> str:
    """Turns by the share of the model's window that they reach; what is an alarm stands out."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "of the model's window", "turns")
        labels = [label for label, _ in by_window]
        colours = [LEAF if place < 4 else BAD for place in range(len(labels))]
        bars = axes.bar(labels, [turns for _, turns in by_window], width=0.62, color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7.5)

    said = (f"{label}: {count(turns)}" for label, turns in by_window)
    return to_svg("window", "Turns by the share of the window. " + "; ".join(said), draw)


def draw_degenerate(health: ConversationHealth) -> str:
    """Share of turns that repeat themselves, by their place in the conversation; the bar, where
    there is one, as a line."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "turn of the conversation", "turns that repeat themselves (%)")
        labels = [b.label for b in health.by_turn]
        shares = [100 * b.share for b in health.by_turn]
        bars = axes.bar(labels, shares, width=0.62, color=BARK)
        axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=7.5)
        if health.max_degenerate is not None:
            axes.axhline(100 * health.max_degenerate, color=BAD, lw=1.2, ls="--")
        axes.set_ylim(0, max(1.0, 1.15 * max(shares)))

    said = (f"{b.label}: {count(b.degenerate)} of {count(b.turns)}" for b in health.by_turn)
    return to_svg("degenerate", "Turns that repeat themselves, by place. " + "; ".join(said), draw)


def draw_arms(audit: Mapping[str, Any]) -> str:
    """`gap_p999` of each arm against the near-tie bar, nats, on a logarithmic scale."""
    gaps = {name: arm["gap_p999"] or 0.0 for name, arm in audit["arms"].items() if name != "again"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        least = min([gap for gap in gaps.values() if gap > 0], default=1e-9) / 10
        values = [max(gap, least) for gap in gaps.values()]
        bars = axes.barh(list(gaps), values, height=0.55, color=[STONE, LEAF, LEAF])
        axes.bar_label(bars, [f"{gap:.1g}" for gap in gaps.values()], padding=4)
        axes.axvline(audit["near_tie_bar"], color=BARK, lw=1.5)
        axes.set_xscale("log")
        axes.set_xlim(least / 2, 6 * max(*values, audit["near_tie_bar"]))
        axes.set_xlabel("nats (line: near-tie bar)")
        axes.invert_yaxis()
        axes.tick_params(length=0)

    said = "; ".join(f"{name}: {gap:.1g}" for name, gap in gaps.items())
    label = f"Deviation of the arms from full prefill, nats. {said}; bar: {audit['near_tie_bar']}"
    return to_svg("arms", label, draw)


def draw_differences(metrics: RunMetrics) -> str:
    """Margin by first differing position, one mark a row; the bars as lines."""
    audit = metrics.audit or {}
    colours = {"near_tie": LEAF, "drift": BARK, "corrupt": BAD}

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = _axes(figure, "first token that differs", "margin (nats)")
        for name, colour in colours.items():
            marks = [
                (difference.position, difference.margin)
                for difference in metrics.differences
                if difference.row_class == name and difference.margin is not None
            ]
            if not marks:
                continue
            x, y = zip(*marks, strict=True)
            axes.plot(x, y, "o", color=colour, ms=4, alpha=0.7, label=name.replace("_", "-"))
        for bar in (audit["near_tie_bar"], audit["hard_bar"]):
            axes.axhline(bar, color=STONE, lw=1, ls="--")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.5, max(axes.get_xlim()[1], 4) + 0.5)
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(bottom=0)
        _legend_above(axes)

    return to_svg("differences", "Margins where audited rows differ", draw)


def _axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_formatter(_short_number)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    return axes


def _short_number(value: float, _place: float) -> str:
    """`1500000` -> `1.5M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2)
