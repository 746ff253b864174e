"""A plan as files of its own: tables and a summary, or one page. Knows no run and no input."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.job.planning import PlannedJob
from pipeline.plan.frames import largest_nodes, tree_frame
from pipeline.storage.durable import replace_file
from pipeline.storage.part_file import encode_parquet
from pipeline.storage.targets import check_replaceable, folder_to_write


def check_plan_targets(folder: Path | None, page: Path | None) -> None:
    """Raises UsageError where `write_plan` or `write_plan_page` would replace another's file."""
    if page is not None:
        check_replaceable(page, [b"<!DOCTYPE html", b"<!doctype html"], "--html")
    for option, path in (("-o", folder), ("--html", page and page.parent)):
        why_not = path and folder_to_write(path)[1]
        if why_not:
            raise UsageError(f"cannot write to {path}: {why_not}; choose another {option}")
    if folder is None or not (folder / "plan.parquet").exists():
        return
    try:
        is_ours = "plan_hash" in json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UsageError(
            f"{folder / 'plan.parquet'} is there and no plan of coppice; choose another -o"
        )


def write_plan(planned: PlannedJob, folder: Path) -> None:
    """Write plan.parquet, tree.parquet and summary.json into `folder`, outside of any run.

    Raises StorageError.
    """
    frames = {"plan": planned.frame(), "tree": tree_frame(planned.plan)}
    for name, frame in frames.items():
        replace_file(folder / f"{name}.parquet", memoryview(encode_parquet(frame.to_arrow())))
    summary = json.dumps(planned.summary.to_json(), indent=2, ensure_ascii=False)
    replace_file(folder / "summary.json", f"{summary}\n".encode())


def write_plan_page(planned: PlannedJob, title: str, path: Path) -> None:
    """Write the plan as one HTML page."""
    from pipeline.report.plan_page import render_plan
    from pipeline.report.tree import Box

    boxes = [Box(*node) for node in largest_nodes(planned.plan).tolist()]
    page = render_plan(title, planned.summary.to_json(), boxes, planned.plan.tree.num_nodes)
    replace_file(path.absolute(), page.encode())
