"""Folders and files whose content we believe: ours, and writable by nobody else."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivate(PermissionError):
    """What lies there could be somebody else's. The message is a clause that says why."""


def private_folder(folder: Path) -> Path:
    """`folder`, made where it is missing, with those above it, for its user alone.

    Raises NotPrivate if it is not ours or others may write to it; OSError.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
                sync_folder(path.parent)
    check_private(os.stat(folder), folder)
    return folder


def stale_in(folder: Path, seconds: float) -> Iterator[Path]:
    """What lies in it and nobody has changed for so long."""
    for path in folder.glob("*"):
        with suppress(OSError):  # somebody else may remove it just now
            if time.time() - path.stat().st_mtime > seconds:
                yield path


def sync_folder(folder: Path) -> None:
    """Make names in this folder survive a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_private(state: os.stat_result, path: Path) -> None:
    """Raises NotPrivate unless what has this state is ours and writable by nobody else."""
    if state.st_uid != os.geteuid():
        raise NotPrivate(f"{path} belongs to another user")
    if state.st_mode & _OTHERS_WRITE:
        raise NotPrivate(f"others may write to {path} (chmod go-w would keep them out)")
