"""Where a run is: a folder of this machine, or in a bucket. Knows nothing about what it holds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import RunDirectoryError
from pipeline.location import Location
from pipeline.storage.durable import is_temp
from pipeline.storage.manifest import MANIFEST_NAME, parse_manifest, read_manifest
from pipeline.storage.object_store import BUCKETS
from pipeline.storage.remote_copy import RemoteCopy
from pipeline.storage.remote_folder import RemoteFolder
from pipeline.storage.remote_run import RemoteRun, check_empty
from pipeline.storage.run_directory import RunDirectory, check_is_run
from pipeline.storage.targets import folder_to_write


def holds_run(run: Location) -> bool:
    """Whether there is a run.json. Raises UsageError, StorageError."""
    if not run.is_remote:
        return (run.local / MANIFEST_NAME).exists()
    if run.scheme not in BUCKETS:  # which can be read, and hold no run
        return False
    return RemoteFolder(run).read(MANIFEST_NAME) is not None


def find_manifest(run: Location) -> dict[str, Any] | None:
    """run.json, None if there is no run. Raises RunDirectoryError, UsageError, StorageError."""
    if not run.is_remote:
        return read_manifest(run.local) if holds_run(run) else None
    held = RemoteFolder(run).read(MANIFEST_NAME)
    return None if held is None else parse_manifest(held.content, str(run))


def check_location(run: Location) -> None:
    """Refuse a location where no run could be begun or resumed, before anything is computed for it.

    Changes nothing there. Raises RunDirectoryError, UsageError, StorageError.
    """
    if not run.is_remote:
        _check_folder(run.local)
    elif not holds_run(run):
        check_empty(RemoteFolder(run))


def _check_folder(folder: Path) -> None:
    there, why_not = folder_to_write(folder)
    if why_not is not None:
        raise RunDirectoryError(
            f"cannot use {folder} as the output folder: {why_not}; choose another one"
        )
    if there == folder.absolute():
        check_is_run(folder, {path.name for path in folder.iterdir() if not is_temp(path)})


def take_run(
    run: Location,
    copies: Path,
    fingerprint: dict[str, Any],
    description: dict[str, Any],
    with_parts: bool = False,
) -> RunDirectory:
    """The run there, begun or resumed, as `RunDirectory.create_or_resume`.

    `copies` is where the working copies of remote runs are; `with_parts`: bring the parts of one
    that is complete, too.
    """
    if not run.is_remote:
        return RunDirectory.create_or_resume(run.path, fingerprint, description)
    return RemoteRun.take(RemoteFolder(run), copies, fingerprint, description, with_parts)


@contextmanager
def reading_run(run: Location, parts: bool = True) -> Iterator[RunDirectory]:
    """The run there, to read or to add files; `parts` False: a remote run's parts stay there.

    Raises RunDirectoryError if there is no run, StorageError.
    """
    if not run.is_remote:
        yield RunDirectory.open(run.path)
        return
    folder = RemoteFolder(run)
    with tempfile.TemporaryDirectory(prefix="coppice-") as root:
        yield RemoteCopy.fetch(folder, Path(root), parts)
