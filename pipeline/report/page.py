"""`report.html` and `report.md` of a run directory. Knows layout and formats, no arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.errors import RunDirectoryError
from pipeline.report import plots
from pipeline.report.metrics import RunMetrics, measure
from pipeline.storage.run_directory import RunDirectory

_UNKNOWN: Final = "–"
_LONGEST_VALUE: Final = 60
_MARKDOWN: Final = re.compile(r"([\\`*_\[\]!|])")


def render(directory: RunDirectory) -> None:
    """Write both files from what the directory holds now; a run that is going on has a report too.

    Raises RunDirectoryError if a JSON file of the directory is damaged.
    """
    metrics = measure(
        directory.read_manifest(),
        _read_json(directory.root / "plan" / "summary.json"),
        _read_json(directory.root / "audit" / "summary.json"),
        directory.scan(),
        _read_audited(directory.root / "audit" / "audit.parquet"),
    )
    directory.write_text("report.html", render_html(metrics))
    directory.write_text("report.md", render_markdown(metrics))


def render_html(metrics: RunMetrics) -> str:
    """One page that needs nothing else: no network, no script, light and dark."""
    return template("page.html.j2").render(
        metrics=metrics,
        settings=list(_flatten(metrics.manifest.get("settings", {}))),
        pictures=[(title, note, Markup(svg)) for title, note, svg in _draw(metrics)],
        proofs=[(title, note, Markup(svg)) for title, note, svg in _draw_audit(metrics)],
    )


def render_markdown(metrics: RunMetrics) -> str:
    """The same numbers, short."""
    return template("page.md.j2").render(metrics=metrics)


def template(name: str) -> Template:
    """A template of this room, with the formats below."""
    environment = Environment(
        loader=PackageLoader("pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (count, percent, size, duration, decimal, cell)
    environment.filters |= {form.__name__: form for form in formats}
    return environment.get_template(name)


def _draw(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """(title, note, SVG) of every picture that there are numbers for."""
    if metrics.depths:
        yield (
            "Where the saving comes from",
            "Prompt tokens of answered rows by planned reuse depth. "
            "The first row of a group pays for its prefix.",
            plots.draw_tokens(metrics),
        )
        yield (
            "Latency by reuse depth",
            "Median, and 10th to 90th percentile; without the wait in the queue.",
            plots.draw_latency(metrics),
        )
        yield (
            "Group sizes",
            "Answered rows by how many rows share their prefix group; 1 is a row on its own.",
            plots.draw_group_sizes(metrics),
        )
    if metrics.plan and metrics.counter("prefilled_tokens"):
        yield (
            "Plan and measurement",
            "A cold run that nothing interrupted computes exactly the tokens of its plan.",
            plots.draw_plan_and_actual(metrics),
        )


def _draw_audit(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """As `_draw`, for the audit's section."""
    audit = metrics.audit or {}
    if audit.get("arms"):
        yield (
            "How far other ways of computing lie from full prefill",
            "By how much the distance between the two likeliest tokens moves, at the 99.9 % "
            "quantile; beyond the bar, differences would no longer be near-ties.",
            plots.draw_arms(audit),
        )
    if any(difference.margin is not None for difference in metrics.differences):
        yield (
            "Where answers part from full prefill, and how close it was",
            "Each audited row that differs: the first token that does, and how far the "
            "baseline's two best tokens are apart there.",
            plots.draw_differences(metrics),
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged ({error}); make it again") from error
    return value


def _read_audited(path: Path) -> pl.DataFrame | None:
    if not path.is_file():
        return None
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error}); audit again") from error


def _flatten(sections: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was said, as (name, text). Reports travel: of prompt text only its length is told."""
    said = ((k, v) for section in sections.values() for k, v in section.items() if v is not None)
    for name, value in said:
        if name == "system_prompt":
            value = f"{len(value)} characters"
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"
        yield name.replace("_", "-"), shown


def count(value: float | None) -> str:
    """`1234567` -> `1,234,567`."""
    return _UNKNOWN if value is None else f"{value:,.0f}"


def decimal(value: float | None) -> str:
    """Three significant digits, or whole numbers from a hundred on."""
    if value is None:
        return _UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """`0.7841` -> `78.4 %`; never rounded to a nothing or a whole that it is not."""
    if value is None:
        return _UNKNOWN
    shown = f"{100 * value:.1f}" if value == 0 or value >= 0.001 else f"{100 * value:.2g}"
    return "99.9 %" if shown == "100.0" and value < 1 else f"{shown} %"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return _UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def duration(value: float | None) -> str:
    """Seconds as `0.42 s`, `12.3 s`, `4 min 02 s`, `3 h 07 min`."""
    if value is None:
        return _UNKNOWN
    if value < 59.95:  # 59.95 would be rounded to "60 s"
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
