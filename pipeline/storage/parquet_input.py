"""One Parquet file that somebody else wrote. Knows nothing about prompts.

Every read checks page checksums (where the file has any) and the values themselves, and every way
in which Arrow can fail on damaged bytes becomes one InputError that names the file.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.storage.columns import plain_schema

BATCH_ROWS = 2048
_MAGIC = b"PAR1"


def find_input_files(path: str | Path) -> tuple[Path, ...]:
    """The file itself, all `*.parquet` below a folder, or what a glob matches, sorted by name.

    Hidden files and those that begin with an underscore are somebody's temporary files: left out.
    Raises InputError if there is nothing.
    """
    place = Path(path)
    with _damage_named(place):
        if place.is_file():
            return (place,)
        if place.is_dir():
            found = [p for p in place.rglob("*.parquet") if p.is_file() and p.name[0] not in "._"]
            lacking = f"the folder {place} holds no *.parquet file; check the path"
        else:
            found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            lacking = f"there is no file, folder or match for {place}; check the path"
    if not found:
        raise InputError(lacking)
    return tuple(sorted(found, key=lambda p: p.as_posix()))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{path} is damaged or not readable ({reason}); write or copy it again"
        ) from error


@dataclass(frozen=True, eq=False)
class ParquetInput:
    """An opened file. `schema` is plain (`columns.plain_type`); `group_rows`: [row groups]."""

    path: Path
    schema: pa.Schema
    metadata: pq.FileMetaData
    group_rows: NDArray[np.int64]
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: Path) -> ParquetInput:
        """Read the footer only. Raises InputError if it is not a whole Parquet file."""
        with _damage_named(path):
            _check_magic(path)
            stamp = _stamp(path)
            with pq.ParquetFile(path) as file:
                metadata, schema = file.metadata, plain_schema(file.schema_arrow)
        groups = range(metadata.num_row_groups)
        rows = np.array([metadata.row_group(g).num_rows for g in groups], np.int64)
        if rows.sum() != metadata.num_rows or (rows < 0).any():
            raise InputError(f"{path} is damaged (row counts disagree); write or copy it again")
        return cls(path, schema, metadata, rows, stamp)

    def iter_batches(self, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
        """The first `num_rows` rows, these columns only, plain, up to BATCH_ROWS at a time.

        Raises InputError where a page is damaged or text is not UTF-8.
        """
        needed = int(np.searchsorted(np.cumsum(self.group_rows), num_rows)) + 1
        groups = list(range(min(needed, len(self.group_rows))))
        left = num_rows
        with self._open() as file, _damage_named(self.path):
            batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))
            for batch in batches:
                table = self._plain(pa.Table.from_batches([batch]).select(list(columns)))
                yield table.slice(0, left)
                left -= min(left, table.num_rows)
                if not left:
                    return
        raise InputError(f"{self.path} ends {left} rows early; write or copy it again")

    def content_hash(self) -> bytes:
        """sha256 of the file's bytes, streamed. Raises InputError if it cannot be read."""
        with _damage_named(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    @contextmanager
    def open_groups(self) -> Iterator[Callable[[int], pa.Table]]:
        """A function that reads one row group, all columns, plain; raises InputError on damage."""
        with self._open() as file:

            def read_group(group: int) -> pa.Table:
                with _damage_named(self.path):
                    return self._plain(file.read_row_group(group))

            yield read_group

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with _damage_named(self.path):
            if _stamp(self.path) != self.stamp:
                raise InputError(f"{self.path} changed while it was being read; start again")
            file = pq.ParquetFile(
                self.path, metadata=self.metadata, page_checksum_verification=True
            )
        with file:
            yield file

    def _plain(self, table: pa.Table) -> pa.Table:
        wanted = pa.schema([self.schema.field(name) for name in table.column_names])
        table = table.cast(wanted)
        table.validate(full=True)
        return table


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(-min(4, os.fstat(file.fileno()).st_size), os.SEEK_END)
        tail = file.read(4)
    if head != _MAGIC:
        how = f": coppice convert {path} {path.stem}.parquet" if path.suffix == ".jsonl" else ""
        raise InputError(f"{path} is not a Parquet file; convert it to Parquet first{how}")
    if tail != _MAGIC:
        raise InputError(f"{path} is a truncated Parquet file; write or copy it again")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
