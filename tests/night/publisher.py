"""A process that publishes files and dies in the middle."""

from __future__ import annotations

from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest

from pipeline.night.folder_target import FolderTarget
from pipeline.night.published import Content
from tests.torture.disk import DeadlyDisk, When


def content(folder: Path, replaces: dict[str, object] | None = None, state: int = 1) -> Content:
    """Two files; each state has another content."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.html": folder / f"page-{state}", "data/rows.parquet": folder / f"rows-{state}"}
    for path in files.values():
        path.write_text(f"{path.name} of state {state}\n")
    return Content({"edition": f"run-{state}"}, files, replaces)


def publish_and_die(
    base: Path, target: Path, kill_at: int, when: When, answered: Synchronized[int]
) -> None:
    """Publish to `target` until operation `kill_at` below `base`; answers nothing."""
    found = content(base / "run")
    with pytest.MonkeyPatch.context() as patch:
        DeadlyDisk(patch, target.parent, kill_at, when)
        FolderTarget(target).publish("2026-11-22", found)
