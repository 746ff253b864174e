"""Pictures of a run as inline SVG. Knows numbers and labels; no files and no page.

Text stays text, the background is transparent, and the ink is the page's own (`currentColor`), so
one picture serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pipeline.report.metrics import RunMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK: Final = "#010203"  # nobody's colour: stands for the page's text colour until the SVG is done
_MOSS: Final = "#5d9441"
_BARK: Final = "#c07f2c"
_STONE: Final = "#8b929b"
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coppice",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STONE,
    "axes.labelcolor": _INK,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _STONE,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw_tokens(metrics: RunMetrics) -> str:
    """Prompt tokens by reuse depth, computed and saved: where the saving comes from."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "reuse depth (tokens)", "prompt tokens")
        labels = [b.label for b in metrics.depths]
        computed = [b.computed_tokens for b in metrics.depths]
        cached = [b.cached_tokens for b in metrics.depths]
        axes.bar(labels, computed, width=0.62, color=_BARK, label="computed")
        axes.bar(labels, cached, width=0.62, bottom=computed, color=_MOSS, label="saved")
        _legend_above(axes)

    return _to_svg("tokens", "Prompt tokens computed and saved, by reuse depth", draw)


def draw_latency(metrics: RunMetrics) -> str:
    """Latency without the queue by reuse depth: median, and 10th to 90th percentile."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "reuse depth (tokens)", "latency without queue (s)")
        for place, depth in enumerate(metrics.depths):
            axes.vlines(place, depth.service_p10_s, depth.service_p90_s, _MOSS, lw=7, alpha=0.45)
            axes.plot(place, depth.service_p50_s, "o", color=_MOSS, ms=7)
        axes.set_xticks(range(len(metrics.depths)), [b.label for b in metrics.depths])
        axes.set_xlim(-0.6, max(len(metrics.depths), 1) - 0.4)
        axes.set_ylim(bottom=0)

    return _to_svg("latency", "Latency without queue, by reuse depth", draw)


def draw_group_sizes(metrics: RunMetrics) -> str:
    """Rows by the size of their prefix group."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "rows in the group", "rows")
        labels = [b.label for b in metrics.group_sizes]
        colours = [_STONE if label == "1" else _MOSS for label in labels]
        bars = axes.bar(labels, [b.rows for b in metrics.group_sizes], width=0.62, color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7.5)

    return _to_svg("groups", "Rows by the size of their prefix group", draw)


def draw_plan_and_actual(metrics: RunMetrics) -> str:
    """Planned and measured, side by side: tokens computed, and the share saved."""
    plan = metrics.plan or {}
    planned_tokens, planned_saving = plan.get("unique_tokens", 0), plan.get("saving", 0.0)
    pairs = (
        ("prompt tokens computed", "{:,.0f}", planned_tokens, metrics.counter("prefilled_tokens")),
        ("saved (%)", "{:.1f}", 100 * planned_saving, 100 * (metrics.saved_share or 0.0)),
    )

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", hspace=0.12)
        for axes, (title, form, planned, actual) in zip(figure.subplots(2, 1), pairs, strict=True):
            values = [actual, planned]
            bars = axes.barh(["measured", "planned"], values, height=0.6, color=[_MOSS, _STONE])
            axes.bar_label(bars, fmt=form, padding=4)
            axes.set_title(title, loc="left", fontsize=8.5)
            axes.set_xlim(0, 1.25 * max(*values, 1e-9))
            axes.xaxis.set_visible(False)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(left=False)

    return _to_svg("plan", "Planned and measured tokens and saving", draw)


def draw_arms(audit: Mapping[str, Any]) -> str:
    """`gap_p999` of each arm against the near-tie bar, nats, on a logarithmic scale."""
    gaps = {name: arm["gap_p999"] or 0.0 for name, arm in audit["arms"].items() if name != "again"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        least = min([gap for gap in gaps.values() if gap > 0], default=1e-9) / 10
        values = [max(gap, least) for gap in gaps.values()]
        bars = axes.barh(list(gaps), values, height=0.55, color=[_STONE, _MOSS, _MOSS])
        axes.bar_label(bars, [f"{gap:.1g}" for gap in gaps.values()], padding=4)
        axes.axvline(audit["near_tie_bar"], color=_BARK, lw=1.5)
        axes.set_xscale("log")
        axes.set_xlim(least / 2, 6 * max(*values, audit["near_tie_bar"]))
        axes.set_xlabel("nats (line: near-tie bar)")
        axes.invert_yaxis()
        axes.tick_params(length=0)

    return _to_svg("arms", "Deviation of the arms from full prefill", draw)


def draw_differences(metrics: RunMetrics) -> str:
    """Margin by first differing position, one mark a row; the bars as lines."""
    audit = metrics.audit or {}
    colours = {"near_tie": _MOSS, "drift": _BARK, "corrupt": _INK}

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
            axes.axhline(bar, color=_STONE, lw=1, ls="--")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(bottom=0)
        _legend_above(axes)

    return _to_svg("differences", "Margins where audited rows differ", draw)


class Box(NamedTuple):
    """A node of the tree: rows `[row_lo, row_hi)` share prompt tokens `[start, end)`."""

    row_lo: int
    row_hi: int
    start: int
    end: int


def draw_tree(boxes: Sequence[Box]) -> str:
    """The largest nodes as an icicle: rows from left to right, tokens from the top down."""

    def draw(figure: Figure) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        axes = _axes(figure, "rows", "prompt tokens")
        axes.xaxis.set_major_formatter(_short_number)
        corners = [(b.row_lo, b.start, b.row_hi - b.row_lo, b.end - b.start) for b in boxes]
        shared = [Rectangle((x, y), w, h) for x, y, w, h in corners if w > 1]
        own = [Rectangle((x, y), w, h) for x, y, w, h in corners if w == 1]
        for patches, colour in ((shared, _MOSS), (own, _STONE)):
            axes.add_collection(PatchCollection(patches, fc=colour, ec=_INK, lw=0.15, alpha=0.8))
        axes.set_xlim(0, max((b.row_hi for b in boxes), default=1))
        axes.set_ylim(max((b.end for b in boxes), default=1), 0)

    return _to_svg("tree", "Prefixes of the prompts and the rows below them", draw, (8.6, 3.2))


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


def _to_svg(
    name: str,
    label: str,
    draw: Callable[[Figure], None],
    inches: tuple[float, float] = (4.2, 2.5),
) -> str:
    """An `<svg>` element for use inside HTML; ids in it begin with `name`. `label` describes it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    size = re.search(r'viewBox="([^"]+)"', svg)
    assert size is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
    return f'<svg viewBox="{size[1]}" role="img" aria-label="{label}">{body.strip()}'
