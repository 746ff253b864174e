"""One Parquet file that somebody else wrote. Knows nothing about prompts.

Every read checks page checksums (where the file has any) and the values themselves, and every way
in which Arrow can fail on damaged bytes becomes one InputError that names the file. The file may be
a copy that we made of another one, its origin: a copy that proves damaged is removed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.storage.input_files import InputFile, damage_named
from pipeline.storage.plain_types import holds_dictionary, plain_schema, plain_table

BATCH_ROWS = 2048
ORIGIN_HASH = b"coppice.origin_sha256"
"""In a copy's footer: what its origin held when it was made."""
_MAGIC = b"PAR1"


@dataclass(frozen=True, eq=False)
class ParquetInput:
    """An opened file. `schema` is plain (`plain_types`); `group_rows`: [row groups].

    `origin`: what the user named and what `stamp` is of; `file` itself, unless that is a copy.
    `constants`: columns that every row has besides those in the file, the last ones of `schema`.
    """

    file: InputFile
    schema: pa.Schema
    metadata: pq.FileMetaData
    group_rows: NDArray[np.int64]
    stamp: tuple[int, int | str]
    origin: InputFile
    constants: dict[str, pa.Scalar] = field(default_factory=dict)

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
        return cls(file, schema, metadata, rows, stamp, file)

    @property
    def is_copy(self) -> bool:
        """Whether the rows are read from a copy that we made of the origin."""
        return self.origin is not self.file

    def with_types(self, types: dict[str, pa.DataType]) -> ParquetInput:
        """With these columns read as other types, which hold their values."""
        fields = [pa.field(f.name, types[f.name]) for f in self.schema]
        constants = {name: value.cast(types[name]) for name, value in self.constants.items()}
        return replace(self, schema=pa.schema(fields), constants=constants)

    def with_constants(self, values: dict[str, pa.Scalar]) -> ParquetInput:
        """With those of these columns that it does not have yet."""
        constants = {name: v for name, v in values.items() if name not in self.schema.names}
        fields = [pa.field(name, value.type) for name, value in constants.items()]
        schema = pa.schema([*self.schema, *fields])
        return replace(self, schema=schema, constants=self.constants | constants)

    def content_hash(self) -> bytes:
        """sha256 of the origin's bytes, and of constants where there are some.

        Raises InputError, also if a copy is of other bytes.
        """
        found = self.origin.content_hash()
        with self._damage_named():
            if self.is_copy and self.metadata.metadata.get(ORIGIN_HASH) != found.hex().encode():
                raise self._changed()
        if not self.constants:
            return found
        constants = sorted((name, value.as_py()) for name, value in self.constants.items())
        return hashlib.sha256(found + repr(constants).encode()).digest()

    def places(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row group, and row in it, of rows `[start, stop)`; a copy's origin is one group."""
        rows = np.arange(start, stop)
        if self.is_copy:
            return np.zeros_like(rows), rows
        first = np.concatenate([[0], np.cumsum(self.group_rows)])
        groups = np.searchsorted(first, rows, side="right") - 1
        return groups, rows - first[groups]

    def iter_batches(self, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
        """The first `num_rows` rows, these columns only, plain, up to BATCH_ROWS at a time.

        Raises InputError where a page is damaged or text is not UTF-8, and after the last batch if
        the file changed meanwhile.
        """
        needed = int(np.searchsorted(np.cumsum(self.group_rows), num_rows)) + 1
        groups = list(range(min(needed, len(self.group_rows))))
        left = num_rows
        with self._open() as file, self._damage_named():
            stored = [name for name in columns if name not in self.constants]
            for batch in _iter_batches(file, groups, stored):
                # Asked for a column `a.b`, Arrow also gives that field of a column `a`.
                table = self._plain(pa.Table.from_batches([batch]).select(stored))
                yield table.select(list(columns)).slice(0, left)
                left -= min(left, table.num_rows)
                if not left:
                    break
        self._check_unchanged()
        if left:
            raise InputError(f"{self.origin.name} ends {left} rows early; write or copy it again")

    @contextmanager
    def open_groups(self) -> Iterator[Callable[[int], pa.Table]]:
        """A function that reads one row group, all columns, plain; raises InputError on damage."""
        with self._open() as file:

            def read_group(group: int) -> pa.Table:
                with self._damage_named():
                    return self._plain(file.read_row_group(group))

            yield read_group

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        self._check_unchanged()
        with self._damage_named():
            if self.is_copy:
                os.utime(self.file.path)  # copies that nobody uses are removed
            source = self.file.open()
        with source:
            with self._damage_named():
                parquet = pq.ParquetFile(
                    source, metadata=self.metadata, page_checksum_verification=True
                )
            with parquet:
                yield parquet
        if not self.origin.is_local:
            # A local file that is replaced stays open as it was; of an object the rest is new.
            self._check_unchanged()

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            with damage_named(self.file.name):
                yield
        except InputError:
            if self.is_copy:
                Path(self.file.path).unlink(missing_ok=True)  # the same command makes it anew
            raise

    def _check_unchanged(self) -> None:
        with damage_named(self.origin.name):
            if self.origin.stamp() != self.stamp:
                raise self._changed()

    def _changed(self) -> InputError:
        return InputError(f"{self.origin.name} changed while it was being read; start again")

    def _plain(self, table: pa.Table) -> pa.Table:
        """With the types of `schema`, checked, and the constants beside."""
        rows = table.num_rows  # a table of no column forgets it when cast
        table = plain_table(table, self.schema)
        table.validate(full=True)
        constants = [pa.repeat(value, rows) for value in self.constants.values()]
        names = [*table.column_names, *self.constants]
        return pa.Table.from_arrays([*table.columns, *constants], names)


def _iter_batches(
    file: pq.ParquetFile, groups: list[int], columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Arrow reads a dictionary inside of another type from one row group at a time only."""
    runs = [groups]
    if any(holds_dictionary(file.schema_arrow.field(name).type) for name in columns):
        runs = [[group] for group in groups]
    for run in runs:
        yield from file.iter_batches(BATCH_ROWS, row_groups=run, columns=columns)


def _check_magic(file: InputFile, source: pa.NativeFile) -> None:
    head = source.read(4)
    source.seek(max(0, source.size() - 4))
    tail = source.read(4)
    if head != _MAGIC:
        raise InputError(
            f"{file.name} is neither a Parquet file nor named .jsonl; convert it to Parquet first"
        )
    if tail != _MAGIC:
        raise InputError(f"{file.name} is a truncated Parquet file; write or copy it again")
