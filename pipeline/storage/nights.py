"""The nights of one job: folders named by date beside each other, each a run directory.

Of all nights but its own a run reads only small files, and one that cannot be read is said to be
damaged: no other night's fault stops this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.storage.lock import is_abandoned
from pipeline.storage.manifest import MANIFEST_NAME, parse_manifest
from pipeline.storage.remote_folder import RemoteFolder

PAGE_NAME: Final = "report.html"
_AUDIT_NAME: Final = "audit/summary.json"
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_AT_MOST: Final = 30


@dataclass(frozen=True)
class NightFiles:
    """What stands in one night's folder. `manifest`, run.json, is None if it is damaged.

    `is_abandoned`: nobody works on it any more.
    """

    date: str
    manifest: dict[str, Any] | None
    audit: dict[str, Any] | None
    has_page: bool
    is_abandoned: bool


def read_nights(root: Path) -> list[NightFiles]:
    """The night in `root` and those before it, oldest first; empty if its name is no date."""
    folder = root.resolve()
    if not _DATE.fullmatch(folder.name):
        return []
    try:
        names = [p.name for p in folder.parent.iterdir() if (p / MANIFEST_NAME).exists()]
    except OSError:  # a parent that may be entered but not listed
        return []
    return [_read_night(folder.parent / name) for name in _until(folder.name, names)]


def read_remote_nights(folder: RemoteFolder) -> list[NightFiles]:
    """As `read_nights`; who works on a night that is elsewhere is not asked."""
    if not _DATE.fullmatch(folder.name):
        return []
    try:
        names = folder.names_beside()
    except StorageError:  # a store that lets this night alone be read
        return []
    nights = (_read_remote_night(folder.beside(name)) for name in _until(folder.name, names))
    return [night for night in nights if night is not None]


def _until(date: str, names: list[str]) -> list[str]:
    """The last thirty nights up to `date`, in order."""
    return sorted(name for name in names if _DATE.fullmatch(name) and name <= date)[-_AT_MOST:]


def _read_night(folder: Path) -> NightFiles:
    def read(name: str) -> bytes:
        return (folder / name).read_bytes()

    has_page = (folder / PAGE_NAME).exists()
    return _parse(folder.name, read, has_page, is_abandoned(folder))


def _read_remote_night(folder: RemoteFolder) -> NightFiles | None:
    """None: a folder named by a date that holds no run."""

    def read(name: str) -> bytes:
        held = folder.read(name)
        return b"" if held is None else held.content

    try:
        names = folder.names_inside()
    except StorageError:
        return NightFiles(folder.name, None, None, has_page=False, is_abandoned=False)
    if MANIFEST_NAME not in names:
        return None
    return _parse(folder.name, read, PAGE_NAME in names, has_ended=False)


def _parse(date: str, read: Callable[[str], bytes], has_page: bool, has_ended: bool) -> NightFiles:
    """`read` gives the content of a file of the night's folder; it may raise."""
    manifest = audit = None
    with suppress(OSError, StorageError, RunDirectoryError):
        manifest = parse_manifest(read(MANIFEST_NAME), date)
    with suppress(OSError, StorageError, ValueError, RecursionError):
        audit = json.loads(read(_AUDIT_NAME))
    return NightFiles(date, manifest, audit, has_page, has_ended)
