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
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.inputs.input_files import InputFile, Stamp, damage_named
from pipeline.storage.plain_types import holds_dictionary, plain_schema, plain_table
from pipeline.storage.row_slices import OpenFile, regroup, rows_at_a_time, text_leaves

BATCH_ROWS = 2048
ORIGIN_HASH = b"coppice.origin_sha256"
"""In a copy's footer: what its origin held when it was made."""
_MAGIC = b"PAR1"
_BLOCK_ROWS = 4096
_MOST_KEPT_BYTES = 256 << 20  # of a block
_MOST_GROWTH = 64  # what text that repeats itself grows by, at most


@dataclass(frozen=True, eq=False)
class ParquetInput:
    """An opened file. `schema` is plain (`plain_types`); `group_rows`: [row groups].

    `first_group`: the row groups [first_group[b], first_group[b + 1]) are block b: what is read at
    once for single rows, many small groups or one. `leaves`: the column chunks of each column.
    `origin`: what the user named and what `stamp` is of; `file` itself, unless that is a copy.
    `constants`: columns that every row has besides those in the file, the last ones of `schema`.
    """

    file: InputFile
    schema: pa.Schema
    metadata: pq.FileMetaData
    group_rows: NDArray[np.int64]
    first_group: NDArray[np.int64]
    leaves: dict[str, list[int]]
    num_bytes: int
    stamp: Stamp
    origin: InputFile
    constants: dict[str, pa.Scalar] = field(default_factory=dict)

    @cached_property
    def _known(self) -> _Known:
        return _Known(self.stamp)

    @classmethod
    def open(cls, file: InputFile) -> ParquetInput:
        """Read the footer only. Raises InputError if it is not a whole Parquet file."""
        with damage_named(file.name):
            stamp = file.stamp()
            with file.open() as source:
                _check_magic(file, source)
                num_bytes = source.size()
                with pq.ParquetFile(source) as parquet:
                    metadata, schema = parquet.metadata, plain_schema(parquet.schema_arrow)
            leaves = _leaves(metadata.schema)
        groups = range(metadata.num_row_groups)
        rows = np.array([metadata.row_group(g).num_rows for g in groups], np.int64)
        if rows.sum() != metadata.num_rows or (rows < 0).any():
            raise InputError(
                f"{file.name} is damaged (row counts disagree); write or copy it again"
            )
        return cls(file, schema, metadata, rows, _blocks(rows), leaves, num_bytes, stamp, file)

    @property
    def block_rows(self) -> NDArray[np.int64]:
        """Rows of each block."""
        return np.diff(np.concatenate([[0], np.cumsum(self.group_rows)])[self.first_group])

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
        self._known.content = found
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
        """The first `num_rows` rows, these columns only, plain, up to BATCH_ROWS at a time; fewer
        where rows are large.

        Raises InputError where a page is damaged or text is not UTF-8, and after the last batch if
        the file changed meanwhile.
        """
        needed = int(np.searchsorted(np.cumsum(self.group_rows), num_rows)) + 1
        groups = range(min(needed, len(self.group_rows)))
        left = num_rows
        with self._open() as file, self._damage_named():
            for table in regroup(self._iter_tables(file, groups, columns), BATCH_ROWS):
                yield table.slice(0, left)
                left -= min(left, table.num_rows)
                if not left:
                    break
        self._check_unchanged()
        if left:
            raise InputError(f"{self.origin.name} ends {left} rows early; write or copy it again")

    @contextmanager
    def open_blocks(self) -> Iterator[Callable[[int], Iterator[pa.Table]]]:
        """A function that reads one block, all columns, plain, in slices; raises InputError on
        damage."""
        with self._open() as file:

            def read_block(block: int) -> Iterator[pa.Table]:
                groups = range(self.first_group[block], self.first_group[block + 1])
                with self._damage_named():
                    yield from self._iter_tables(file, groups, self.schema.names)

            yield read_block

    @property
    def most_kept_bytes(self) -> int:
        """How large a block may be to be kept in memory: what the file itself takes counts."""
        return max(_MOST_KEPT_BYTES, self.num_bytes * _MOST_GROWTH)

    def _iter_tables(
        self, file: OpenFile, groups: range, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Plain tables of these row groups, none of which can decode to too much at once."""
        stored = [name for name in columns if name not in self.constants]
        leaves = [leaf for name in stored for leaf in self.leaves[name]]
        runs: list[tuple[int, list[int]]] = []
        # Arrow reads a dictionary inside of another type from one row group at a time only.
        is_alone = any(holds_dictionary(file.types[name]) for name in stored)
        for group in groups:
            rows = rows_at_a_time(file, group, stored, leaves, BATCH_ROWS)
            if is_alone or not runs or runs[-1][0] != rows:
                runs.append((rows, []))
            runs[-1][1].append(group)
        for rows, run in runs:
            for batch in file.parquet.iter_batches(
                rows, row_groups=run, columns=stored, use_threads=rows == BATCH_ROWS
            ):
                # Asked for a column `a.b`, Arrow also gives that field of a column `a`.
                table = self._plain(pa.Table.from_batches([batch]).select(stored))
                yield table.select(list(columns))

    @contextmanager
    def _open(self) -> Iterator[OpenFile]:
        self._check_unchanged()
        with self._damage_named():
            if self.is_copy:
                os.utime(self.file.path)  # copies that nobody uses are removed
            source = self.file.open()
        with source:
            with self._damage_named():
                options = {"metadata": self.metadata, "page_checksum_verification": True}
                parquet = pq.ParquetFile(source, **options)
                texts = text_leaves(self.metadata.schema)
                dictionaries = pq.ParquetFile(source, read_dictionary=texts, **options)
            with parquet, dictionaries:
                types = {field.name: field.type for field in parquet.schema_arrow}
                yield OpenFile(parquet, dictionaries, types)
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
        known = self._known
        with damage_named(self.origin.name):
            stamp = self.origin.stamp()
        if stamp == known.stamp:
            return
        # Whoever links a file or changes its rights changes a time of it, and not what it holds.
        if stamp[:2] != self.stamp[:2] or known.content != self.origin.content_hash():
            raise self._changed()
        known.stamp = stamp

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


@dataclass
class _Known:
    """The last stamp under which the origin held what it did; `content`: its hash, once made."""

    stamp: Stamp
    content: bytes | None = None


def _blocks(group_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """First group of each block, and the end: of so many rows, or one group."""
    cuts, rows = [0], 0
    for group, more in enumerate(group_rows.tolist()):
        if rows and rows + more > _BLOCK_ROWS:
            cuts.append(group)
            rows = 0
        rows += more
    return np.array([*cuts, len(group_rows)], np.int64)


def _leaves(schema: pq.ParquetSchema) -> dict[str, list[int]]:
    """The numbers of the column chunks that each column is stored in, and those named alike."""
    found: dict[str, list[int]] = {}
    for number in range(len(schema)):
        path = schema.column(number).path
        steps = path.split(".")
        for end in range(1, len(steps) + 1):
            found.setdefault(".".join(steps[:end]), []).append(number)
    return found


def _check_magic(file: InputFile, source: pa.NativeFile) -> None:
    head = source.read(4)
    source.seek(max(0, source.size() - 4))
    tail = source.read(4)
    if head != _MAGIC:
        raise InputError(
            f"{file.name} is neither a Parquet file nor named .jsonl, .json or .csv; convert it "
            "first"
        )
    if tail != _MAGIC:
        raise InputError(f"{file.name} is a truncated Parquet file; write or copy it again")
