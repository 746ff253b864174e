"""A copy of a run in a bucket: what was fetched of it is read here, and files are added there.

Readers trust the parts that run.json names. Knows nothing of how a run is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from pipeline.errors import CoppiceError, StorageError
from pipeline.storage.committed_parts import SUCCESS_NAME
from pipeline.storage.durable import replace_file
from pipeline.storage.lock import FolderLock, is_dead
from pipeline.storage.manifest import MANIFEST_NAME, no_run, parse_manifest
from pipeline.storage.metrics_log import METRICS_NAME
from pipeline.storage.nights import NightFiles, read_remote_nights
from pipeline.storage.part_list import is_stored, named_parts, part_file
from pipeline.storage.remote_folder import RemoteFolder
from pipeline.storage.run_directory import (
    AUDIT_NAMES,
    PLAN_NAME,
    SYSTEM_PROMPT_NAME,
    RunDirectory,
)

SUMMARY_NAME: Final = "plan/summary.json"
TREE_NAME: Final = "plan/tree.parquet"
_READ_NAMES: Final = (
    PLAN_NAME, SUMMARY_NAME, METRICS_NAME, SYSTEM_PROMPT_NAME, SUCCESS_NAME, *AUDIT_NAMES,
)  # fmt: skip
Result = TypeVar("Result")


class RemoteCopy(RunDirectory):
    """From `fetch`, for status, audit and report. `root` is the copy.

    run.json has two more fields here: `parts`, by name, and `writer`. After the first fault the
    store is left alone.
    """

    def __init__(self, root: Path, lock: FolderLock | None, folder: RemoteFolder) -> None:
        super().__init__(root, lock)
        self.name = folder.url
        self._folder = folder
        self._fault: CoppiceError | None = None

    @classmethod
    def fetch(cls, folder: RemoteFolder, root: Path, with_parts: bool) -> RemoteCopy:
        """A copy in the empty folder `root`, which is the caller's; with or without the parts.

        Raises RunDirectoryError if there is no run, StorageError if a part is missing or altered.
        """
        held = folder.read(MANIFEST_NAME)
        if held is None:
            raise no_run(folder.url)
        manifest, present = parse_manifest(held.content, folder.url), folder.names()
        run = cls(root, None, folder)
        replace_file(root / MANIFEST_NAME, held.content)
        for name in (*_READ_NAMES, *((TREE_NAME,) if with_parts else ())):
            if name in present:
                folder.fetch(name, root / name)
        if with_parts or "parts" not in manifest:
            run._fetch_parts(named_parts(manifest, present))
        return run

    @property
    def has_parts(self) -> bool:
        """As of a run directory; not where only run.json and its like were fetched."""
        names = self.read_manifest().get("parts", {})
        return all((self.data / name).exists() for name in names)

    @property
    def is_abandoned(self) -> bool:
        """Whether the writer was a process of this machine that has ended."""
        return is_dead(self.read_manifest().get("writer", {}).get("name", ""))

    def nights(self) -> list[NightFiles]:
        """As of a run directory."""
        return read_remote_nights(self._folder)

    def count_rows(self) -> tuple[int, int]:
        """(answered, failed) rows of the parts that run.json names."""
        if self.has_parts:
            return super().count_rows()
        parts = self._parts().values()
        return sum(part["rows_ok"] for part in parts), sum(part["rows_error"] for part in parts)

    def check_committed(self) -> None:
        """As of a run directory; where the parts are not here, by what run.json says of them."""
        if self.has_parts:
            super().check_committed()
            return
        self._check_stored(self._folder.names("data/"))
        rows, named = self.planned_rows(), sum(self.count_rows())
        if self.is_sealed and (rows is None or named != len(rows)):
            planned = "nobody knows how many" if rows is None else len(rows)
            raise StorageError(
                f"the parts that {self.name}/{MANIFEST_NAME} names hold {named} rows where "
                f"{planned} were planned; run the same command again"
            )

    def part_names(self) -> list[str]:
        """As of a run directory, of the parts that run.json names."""
        if "parts" not in self.read_manifest():
            return super().part_names()
        return sorted(self._parts())

    def _fetch_parts(self, parts: dict[str, Any]) -> None:
        """Bring the parts that are not here. Raises StorageError if one is not what was put."""
        for name in parts:
            path = self.data / name
            if path.exists():
                continue
            self._folder.fetch(part_file(name), path)
            try:
                self._footers[path] = self._read_footer(path)
            except StorageError:
                path.unlink()
                raise StorageError(
                    f"{self.name}/data/{name} was altered after it was written; delete it and run "
                    "the same command again: its rows will be computed anew"
                ) from None

    def _check_stored(self, present: dict[str, int]) -> None:
        """Raises StorageError if a part of ours went from the store behind our back."""
        for name, part in self._parts().items():
            if not is_stored(name, part, present):
                raise StorageError(
                    f"{self.name}/data/{name} is not there any more; run the same command again"
                )

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = self.read_manifest().get("parts", {})
        return parts

    def _write(self, name: str, content: bytes | memoryview) -> None:
        super()._write(name, content)
        if name != MANIFEST_NAME:  # which has a rule of its own
            self._put(name)

    def _put(self, name: str) -> None:
        path = self.root / name
        if path.exists():
            self._call(lambda: self._folder.put(name, path))

    def _call(self, act: Callable[[], Result]) -> Result:
        if self._fault is not None:
            raise self._fault
        try:
            return act()
        except StorageError as error:
            self._fault = error
            raise
