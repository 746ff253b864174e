"""The folder of one run: what it is, what is done, and that nothing is missing at the end.

Knows nothing about models or prompts. Everything in it is written aside and renamed; the parts'
own footers are the only record of what is done.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.private_folder import sync_folder
from pipeline.storage.card import render_card
from pipeline.storage.committed_parts import SUCCESS_NAME, CommittedParts
from pipeline.storage.durable import is_temp, make_folder, replace_file, write_errors
from pipeline.storage.lock import LOCK_NAME, FolderLock, is_abandoned
from pipeline.storage.manifest import (
    MANIFEST_NAME,
    STORE_FIELDS,
    check_fingerprint,
    new_manifest,
    read_manifest,
)
from pipeline.storage.metrics_log import append_metrics
from pipeline.storage.nights import NightFiles, read_nights
from pipeline.storage.part_file import PartFooter, encode_parquet, write_part
from pipeline.storage.part_swap import put_back, read_part, swap_part
from pipeline.storage.run_tables import read_table

PLAN_NAME = "plan/plan.parquet"
SYSTEM_PROMPT_NAME = "system_prompt.txt"
RETRIED_NAME = "retried.parquet"
AUDIT_NAMES = ("audit/summary.json", "audit/audit.parquet")


class RunDirectory(CommittedParts):
    """From `create_or_resume` (holds the lock until `close`) or `open` (reads, and adds files)."""

    def __init__(self, root: Path, lock: FolderLock | None) -> None:
        super().__init__(root)
        self._lock = lock

    @classmethod
    def create_or_resume(
        cls, root: str | Path, fingerprint: dict[str, Any], description: dict[str, Any]
    ) -> RunDirectory:
        """Take the lock; write run.json, or compare the one that is there; drop own temp files.

        Both dicts must be JSON. `description` (settings, versions, device, input, engine) is only
        written, never compared. Raises RunDirectoryError if the folder is in use, is not a run of
        ours, or holds a run whose fingerprint differs.
        """
        folder = Path(root)
        _make_folder(folder)
        lock = FolderLock(folder)
        run = cls(folder, lock)
        try:
            run._drop_temp_files()
            if (folder / MANIFEST_NAME).exists():
                manifest = run.read_manifest()
                check_fingerprint(folder, manifest["fingerprint"], fingerprint)
                if manifest.keys() & STORE_FIELDS:  # a copy of what was in a store
                    held = {k: v for k, v in manifest.items() if k not in STORE_FIELDS}
                    run.write_json(MANIFEST_NAME, held)
            else:
                run.write_json(MANIFEST_NAME, new_manifest(fingerprint) | description)
            with write_errors(run.data):
                make_folder(run.data)
            put_back(run.data, run.footers)
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def open(cls, root: str | Path) -> RunDirectory:
        """For status, audit and report, also while the run is going on: takes no lock.

        Raises RunDirectoryError if the folder holds no run.
        """
        run = cls(Path(root), None)
        run.read_manifest()
        return run

    @property
    def is_sealed(self) -> bool:
        """Whether every row is there and counted."""
        return (self.root / SUCCESS_NAME).exists()

    @property
    def is_whole(self) -> bool:
        """Whether the parts of a sealed run are all there still. Raises StorageError."""
        rows = self.planned_rows()
        return rows is not None and np.array_equal(self.done_rows(), rows)

    @property
    def has_parts(self) -> bool:
        """Whether the parts are on this machine."""
        return True

    @property
    def is_abandoned(self) -> bool:
        """Whether the process that works on it has ended, as far as this machine can tell."""
        return is_abandoned(self.root)

    def update_manifest(self, **fields: Any) -> None:
        """Replace these top-level fields of run.json. Only the holder of the lock may."""
        self._check_locked()
        self.write_json(MANIFEST_NAME, self.read_manifest() | fields)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` at a relative name like `plan/summary.json`. Raises ValueError on NaN."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def write_frame(self, name: str, frame: pl.DataFrame) -> None:
        """Write a Parquet file at a relative name."""
        self._write(name, memoryview(encode_parquet(frame.to_arrow())))

    def write_text(self, name: str, text: str) -> None:
        """Write UTF-8 text at a relative name. Raises StorageError."""
        self._write(name, text.encode())

    def write_part(self, number: int, table: pa.Table, provenance: dict[str, str]) -> Path:
        """Commit a part, as `part_file.write_part`. Raises StorageError."""
        self._check_locked()
        return write_part(self.data, number, table, provenance)

    def replace_part(self, footer: PartFooter, table: pa.Table) -> None:
        """Commit `table` in the place of a part; of no rows, nothing. Raises StorageError."""
        self._check_locked()
        swap_part(footer, table)
        self._footers.pop(footer.path, None)

    def extend_part(self, footer: PartFooter, table: pa.Table) -> None:
        """Add rows to a part and put them all in input order. Raises StorageError."""
        rows = pa.concat_tables([read_part(footer).cast(table.schema), table])
        self.replace_part(footer, rows.sort_by("row_index"))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl. Raises StorageError."""
        append_metrics(self.root, record)

    def nights(self) -> list[NightFiles]:
        """This run and the earlier nights of its job, oldest first; empty if it is no night's."""
        return read_nights(self.root)

    def planned_rows(self) -> NDArray[np.int64] | None:
        """Ascending input rows that this run answers, of all or of its shard; None: no plan yet."""
        remedy = "delete it and run the same command again"
        table = read_table(self.root / PLAN_NAME, ["row_index"], remedy)
        if table is None:
            return None
        rows = table.to_series().cast(pl.Int64, strict=False)
        return rows.drop_nulls().sort().to_numpy()

    def seal(self, rows: NDArray[np.int64]) -> None:
        """Check that these rows are there once each and no other, then mark the run complete.

        Writes failed.parquet and README.md, sets the status, and `_SUCCESS` last. Raises
        StorageError with the counts if a row is missing, foreign or has the id of another one.
        """
        self._check_locked()
        self.check_rows(rows)
        failed = self.scan().filter(pl.col("status") == "error").sort("row_index").collect()
        self.write_frame("failed.parquet", failed)
        self.write_text(
            "README.md",
            render_card(self.read_manifest(), len(rows), failed.height, self.schema()),
        )
        self.update_manifest(status="complete")
        self.write_text(SUCCESS_NAME, "".join(f"{name}\n" for name in self.part_names()))

    def close(self) -> None:
        """Release the lock, if it is held."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unseal(self, with_audit: bool) -> None:
        """Take the mark away, and before it the audit where rows will be written anew.

        In this order no audit of other rows outlives a crash in between.
        """
        self._check_locked()
        audit = self._inside("audit")
        with write_errors(self.root):
            if with_audit and audit.is_dir():
                for name in AUDIT_NAMES:
                    self._inside(name).unlink(missing_ok=True)
                sync_folder(audit)
            (self.root / SUCCESS_NAME).unlink(missing_ok=True)
            sync_folder(self.root)

    def check_complete(self) -> None:
        """Raises RunDirectoryError for an unfinished run, StorageError as `check_committed`."""
        if not self.is_sealed:
            raise RunDirectoryError(
                f"the run in {self.name} is not complete; finish it by the command that began it"
            )
        self.check_committed()

    def check_committed(self) -> None:
        """Whoever shows or copies rows asks this first: nothing is altered, twice, or missing.

        Of a run that is not sealed rows may be missing. Raises StorageError that names the part.
        """
        rows = self.planned_rows()
        if not self.is_sealed:
            self.done_rows()
        elif rows is None:
            raise StorageError(
                f"{self.name}/{PLAN_NAME} is gone, so nobody knows whether rows are missing; "
                "run the same command again"
            )
        else:
            self.check_rows(rows)

    def _write(self, name: str, content: bytes | memoryview) -> None:
        replace_file(self._inside(name), content)

    def _check_locked(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(f"{self.name} was opened for reading; resume it to change it")
        if not self._lock.is_held:
            raise RunDirectoryError(
                f"{self.root} was moved away or deleted while the job ran; put it back, or run "
                "the same command again"
            )

    def _drop_temp_files(self) -> None:
        with write_errors(self.root):
            folders = [self.root, *(path for path in self.root.iterdir() if path.is_dir())]
            for path in [path for folder in folders for path in folder.iterdir()]:
                if is_temp(path):
                    path.unlink(missing_ok=True)

    def _inside(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        assert parts and parts[0] != "/" and ".." not in parts, name
        return self.root.joinpath(*parts)


def _make_folder(folder: Path) -> None:
    """Make the folder, or refuse one that holds something else than a run of ours."""
    try:
        make_folder(folder)
        names = {path.name for path in folder.iterdir() if not is_temp(path)}
    except OSError as error:
        raise RunDirectoryError(
            f"cannot use {folder} as the output folder ({error.strerror}); choose another one"
        ) from error
    check_is_run(folder, names)
    if MANIFEST_NAME in names:
        read_manifest(folder)  # somebody else's run.json: leave nothing of ours beside it


def check_is_run(folder: Path, names: set[str]) -> None:
    """Raises RunDirectoryError if a folder that holds these names is somebody else's."""
    if MANIFEST_NAME not in names and names - {LOCK_NAME}:
        raise RunDirectoryError(
            f"{folder} is not empty and holds no run of coppice; choose a new folder"
        )
