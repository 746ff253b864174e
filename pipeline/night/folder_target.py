"""Publications in a folder, each committed by one rename. Knows nothing about runs and audits.

```
 TARGET/.staging/<date>-<edition>/   report.html  report.md  data/part-…  published.json
    └── one rename ──► TARGET/<date>/       so that TARGET/*/data/*.parquet is never half a night
```

The staging folder is one level deeper than what readers look for: polars and pathlib take a hidden
folder for any other. Files are copied, by reference where the file system can: what is published
shares nothing with its run, and a link of the run is none of ours. Whoever publishes
holds the lock of TARGET, so what he meets in staging is of somebody who died, and goes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any, Final

from pipeline.errors import FolderInUse, RunDirectoryError
from pipeline.night.published import MARKER, Content, describe_file, marker
from pipeline.private_folder import sync_folder
from pipeline.storage.durable import copy_file, make_folder, write_errors, write_stream
from pipeline.storage.lock import FolderLock
from pipeline.storage.targets import folder_to_write

_STAGING: Final = ".staging"
_OCCUPIED: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_READABLE: Final = 0o666  # less what the umask takes away
_WAIT_S = 60.0
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class FolderTarget:
    """See `night.publication.Target`."""

    def __init__(self, target: Path) -> None:
        self._root = target

    def location(self, date: str) -> str:
        """Path of a publication."""
        return str(self._root / date)

    def read(self, date: str) -> dict[str, Any] | None:
        """`published.json` of a publication; None if there is none."""
        return MARKER.read(self._root / date)

    def check(self, date: str) -> None:
        """See `night.publication.Target`."""
        _, why_not = folder_to_write(self._root)
        if why_not is not None:
            raise RunDirectoryError(
                f"cannot publish to {self._root}: {why_not}; choose another folder"
            )
        final = self._root / date
        is_free = not final.exists() or (final.is_dir() and next(final.iterdir(), None) is None)
        if not is_free and self.read(date) is None:
            raise _occupied(final)

    def publish(self, date: str, content: Content) -> None:
        """Put the content there by one rename, or leave all as it was."""
        above = self._root / _STAGING
        staging = above / f"{date}-{content.edition}-{secrets.token_hex(4)}"
        with write_errors(self._root):
            make_folder(self._root)
        lock = _wait_for_lock(self._root)
        try:
            with write_errors(self._root / date):
                shutil.rmtree(above, ignore_errors=True)  # of somebody who died, if it is ours
                try:
                    _fill(staging, content)
                    self._commit(staging, date, content)
                finally:
                    shutil.rmtree(above, ignore_errors=True)  # or the next one does it
        finally:
            lock.release()

    def _commit(self, staging: Path, date: str, content: Content) -> None:
        final = self._root / date
        if content.replaces is None:
            try:
                os.rename(staging, final)
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
                raise _occupied(final) from error
        else:
            _exchange(staging, final)
        sync_folder(self._root)


def _occupied(final: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"{final} is there already and is no publication of this run; move it away"
    )


def _wait_for_lock(folder: Path) -> FolderLock:
    """Other jobs may publish to the same folder, and are soon done. Raises FolderInUse."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            return FolderLock(folder, is_shared=True)
        except FolderInUse:
            if time.monotonic() > until:
                raise
            time.sleep(_WAIT_S / 100)


def _fill(staging: Path, content: Content) -> None:
    """Everything that will be published, and the marker; flushed to the disk.

    The files of the run are their user's alone; these whoever may read the folder may read, as the
    umask or the ACLs have it.
    """
    described = {}
    staging.mkdir(parents=True)
    for name, source in content.files.items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, path, _READABLE)
        described[name] = describe_file(path, name)
    write_stream(staging / MARKER.name, [marker(content.described, described)], _READABLE)
    for folder in sorted({path.parent for path in staging.rglob("*")}, reverse=True):
        sync_folder(folder)


def _exchange(one: Path, other: Path) -> None:
    """Two folders change places in one step. Raises RunDirectoryError where that cannot be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    done = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    if done != 0:
        reason = os.strerror(ctypes.get_errno())
        raise RunDirectoryError(
            f"{other} holds an earlier state of this run and cannot be exchanged here ({reason}); "
            "move it away to publish this one"
        )
