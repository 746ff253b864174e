"""`report.html` and `report.md` of a run directory. Knows layout and formats, no arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from markupsafe import Markup

from pipeline.costs import NO_COSTS, CostSettings
from pipeline.report import formats, plots
from pipeline.report.metrics import AUDIT_COLUMNS, RunMetrics, measure
from pipeline.report.sparks import draw_trend
from pipeline.report.templates import template
from pipeline.report.tree import TREE_COLUMNS, TreePicture, picture_of
from pipeline.report.trend import read_trend
from pipeline.storage.manifest import notes_of
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_tables import read_table
from pipeline.storage.summaries import AUDIT_AGAIN, AUDIT_SUMMARY, PLAN_SUMMARY

_LONGEST_VALUE: Final = 60
# Settings that are kept as bytes or seconds, as a person would write them.
_WRITERS: Final[Mapping[str, Callable[[float], str]]] = dict.fromkeys(
    ("plan_memory", "kv_budget", "kv_store_budget"), formats.size
) | dict.fromkeys(("time_budget", "stall_timeout"), formats.duration)


def render(directory: RunDirectory, price: CostSettings = NO_COSTS) -> None:
    """Write both files from what the directory holds now; a run that is going on has a report too.
    `price`: over the one that it recorded.

    Raises RunDirectoryError if a file of the directory is damaged, StorageError if rows of a
    complete run are missing, or a part was altered or is there twice.
    """
    directory.check_committed()
    root = directory.root
    remedy = "delete it, and the report goes without"
    tree = read_table(root / "plan" / "tree.parquet", TREE_COLUMNS, remedy)
    plan = PLAN_SUMMARY.read(root)
    metrics = measure(
        directory.read_manifest(),
        plan,
        AUDIT_SUMMARY.read(root),
        directory.scan(),
        read_table(root / "audit" / "audit.parquet", AUDIT_COLUMNS, AUDIT_AGAIN),
        tree,
        read_trend(directory.nights(), price),
        price,
    )
    documents = (plan or {}).get("documents") or {"mode": "prefix"}
    is_drawn = documents["mode"] == "prefix"  # or rows lie below several nodes of the tree
    picture = None if tree is None or tree.is_empty() or not is_drawn else picture_of(tree)
    directory.write_text("report.html", render_html(metrics, picture))
    directory.write_text("report.md", _render_markdown(metrics))


def _render_markdown(metrics: RunMetrics) -> str:
    return template("page.md.j2").render(metrics=metrics, notes=notes_of(metrics.manifest))


def render_html(metrics: RunMetrics, tree: TreePicture | None = None) -> str:
    """One page that needs nothing else: no network, light and dark, whole without its script."""
    return template("page.html.j2").render(
        metrics=metrics,
        job=_name_job(metrics.manifest),
        notes=notes_of(metrics.manifest),
        settings=list(_flatten(metrics.manifest.get("settings", {}))),
        tree=tree,
        tree_svg=Markup(tree.svg if tree else ""),
        pictures=[(title, note, Markup(svg)) for title, note, svg in _draw(metrics)],
        proofs=[(title, note, Markup(svg)) for title, note, svg in _draw_audit(metrics)],
        turn_pictures=[(title, note, Markup(svg)) for title, note, svg in _draw_turns(metrics)],
        trend=draw_trend(metrics.trend),
    )


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


def _draw_turns(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """As `_draw`, for the section on conversations."""
    health = metrics.conversations
    if health is not None and health.by_window:
        yield (
            "How far turns reach into the model's window",
            "Answered turns by the distance from the first kept token to the newest, as a share "
            "of the window; the worst moment of each.",
            plots.draw_window(health.by_window),
        )
    if health is not None and health.by_turn:
        yield (
            "Answers that repeat themselves",
            "By the place of the turn in its conversation: the share that says the same over and "
            "over, or what the answer before said.",
            plots.draw_degenerate(health),
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


def _name_job(manifest: dict[str, Any]) -> tuple[str, str]:
    """(input, model) as a person calls them: without the folders that they are in, but for that
    of a pattern, which is all that tells one night's `*.parquet` from another's."""
    source = str(manifest.get("input", {}).get("argument", "prompts"))
    model = str(manifest.get("settings", {}).get("model", {}).get("model", "a model"))
    steps = source.rstrip("/").split("/")
    named = next((n for n in range(len(steps) - 1, 0, -1) if not set(steps[n]) & set("*?[")), 0)
    return "/".join(steps[named:]), (
        model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".", "~")) else model
    )


def _flatten(sections: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was said, as (name, text). Reports travel: of prompt text only its length is told."""
    said = ((k, v) for section in sections.values() for k, v in section.items() if v is not None)
    for name, value in said:
        if name == "system_prompt":
            value = f"{len(value)} characters"
        write = _WRITERS.get(name)
        if write is not None and isinstance(value, int | float):
            value = write(value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"
        yield name.replace("_", "-"), shown
