"""The nights of one job: folders named by date beside each other, each a run directory.

Of all nights but its own a run reads only small files, and one that cannot be read is said to be
damaged: no other night's fault stops this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.errors import RunDirectoryError
from pipeline.storage.lock import is_abandoned
from pipeline.storage.manifest import MANIFEST_NAME, parse_manifest

PAGE_NAME: Final = "report.html"
_AUDIT_NAME: Final = "audit/summary.json"
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_AT_MOST: Final = 30


@dataclass(frozen=True)
class NightFiles:
    """What stands in one night's folder. `manifest`, run.json, is None if it is damaged."""

    date: str
    manifest: dict[str, Any] | None
    audit: dict[str, Any] | None
    has_page: bool
    is_abandoned: bool


def is_date(name: str) -> bool:
    """Whether a folder of this name can be a night's."""
    return _DATE.fullmatch(name) is not None


def nights_until(date: str, dates: list[str]) -> list[str]:
    """The last thirty nights up to `date`, in order."""
    return sorted(name for name in dates if is_date(name) and name <= date)[-_AT_MOST:]


def read_nights(root: Path) -> list[NightFiles]:
    """The night in `root` and those before it, oldest first; empty if its name is no date."""
    folder = root.resolve()
    if not is_date(folder.name):
        return []
    try:
        names = [p.name for p in folder.parent.iterdir() if (p / MANIFEST_NAME).exists()]
    except OSError:  # a parent that may be entered but not listed
        return []
    return [_read_night(folder.parent / name) for name in nights_until(folder.name, names)]


def parse_night(
    date: str, read: Callable[[str], bytes | None], has_page: bool, abandoned: bool
) -> NightFiles:
    """`read` gives the content of a file of the night's folder, None if there is none."""
    try:
        manifest = parse_manifest(read(MANIFEST_NAME) or b"", date)
    except RunDirectoryError:
        manifest = None
    try:
        audit = json.loads(read(_AUDIT_NAME) or b"null")
    except ValueError:
        audit = None
    return NightFiles(date, manifest, audit, has_page, abandoned)


def _read_night(folder: Path) -> NightFiles:
    def read(name: str) -> bytes | None:
        try:
            return (folder / name).read_bytes()
        except OSError:
            return None

    has_page = (folder / PAGE_NAME).exists()
    return parse_night(folder.name, read, has_page, is_abandoned(folder))
