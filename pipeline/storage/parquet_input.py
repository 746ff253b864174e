"""One Parquet file that somebody else wrote. Knows nothing about prompts.

Every read checks page checksums (where the file has any) and the values themselves, and every way
in which Arrow can fail on damaged bytes becomes one InputError that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.storage.columns import plain_schema
from pipeline.storage.input_files import InputFile, damage_named
from pipeline.storage.object_store import is_url

BATCH_ROWS = 2048
_MAGIC = b"PAR1"


@dataclass(frozen=True, eq=False)
class ParquetInput:
    """An opened file. `schema` is plain (`columns.plain_type`); `group_rows`: [row groups]."""

    file: InputFile
    schema: pa.Schema
    metadata: pq.FileMetaData
    group_rows: NDArray[np.int64]
    stamp: tuple[int, int | str]

    @classmethod
    def open(cls, file: InputFile) -> ParquetInput:
        """Read the footer only. Raises InputError if it is not a whole Parquet file."""
        with damage_named(file.name):
            stamp = file.stamp()
            with file.open() as source:
                _check_magic(file, source)
                with pq.ParquetFile(source) as parquet:
                    metadata, schema = parquet.metadata, plain_schema(parquet.schema_arrow)
        groups = range(metadata.num_row_groups)
        rows = np.array([metadata.row_group(g).num_rows for g in groups], np.int64)
        if rows.sum() != metadata.num_rows or (rows < 0).any():
            raise InputError(
                f"{file.name} is damaged (row counts disagree); write or copy it again"
            )
        return cls(file, schema, metadata, rows, stamp)

    def iter_batches(self, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
        """The first `num_rows` rows, these columns only, plain, up to BATCH_ROWS at a time.

        Raises InputError where a page is damaged or text is not UTF-8.
        """
        needed = int(np.searchsorted(np.cumsum(self.group_rows), num_rows)) + 1
        groups = list(range(min(needed, len(self.group_rows))))
        left = num_rows
        with self._open() as file, damage_named(self.file.name):
            batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))
            for batch in batches:
                table = self._plain(pa.Table.from_batches([batch]).select(list(columns)))
                yield table.slice(0, left)
                left -= min(left, table.num_rows)
                if not left:
                    return
        raise InputError(f"{self.file.name} ends {left} rows early; write or copy it again")

    @contextmanager
    def open_groups(self) -> Iterator[Callable[[int], pa.Table]]:
        """A function that reads one row group, all columns, plain; raises InputError on damage."""
        with self._open() as file:

            def read_group(group: int) -> pa.Table:
                with damage_named(self.file.name):
                    return self._plain(file.read_row_group(group))

            yield read_group

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        self._check_unchanged()
        with damage_named(self.file.name):
            source = self.file.open()
        with source:
            with damage_named(self.file.name):
                parquet = pq.ParquetFile(
                    source, metadata=self.metadata, page_checksum_verification=True
                )
            with parquet:
                yield parquet
        if is_url(self.file.name):
            # A local file that is replaced stays open as it was; of an object the rest is new.
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        with damage_named(self.file.name):
            changed = self.file.stamp() != self.stamp
        if changed:
            raise InputError(f"{self.file.name} changed while it was being read; start again")

    def _plain(self, table: pa.Table) -> pa.Table:
        wanted = pa.schema([self.schema.field(name) for name in table.column_names])
        table = table.cast(wanted)
        table.validate(full=True)
        return table


def _check_magic(file: InputFile, source: pa.NativeFile) -> None:
    head = source.read(4)
    source.seek(max(0, source.size() - 4))
    tail = source.read(4)
    if head != _MAGIC:
        stem, dot, ending = file.name.rpartition(".")
        how = f": coppice convert {file.name} {stem}.parquet" if dot + ending == ".jsonl" else ""
        raise InputError(f"{file.name} is not a Parquet file; convert it to Parquet first{how}")
    if tail != _MAGIC:
        raise InputError(f"{file.name} is a truncated Parquet file; write or copy it again")
