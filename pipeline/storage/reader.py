"""The prompts of a job, read in a stream. Knows nothing about tokens or models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError, NoInput, UsageError
from pipeline.records import Message, PromptBatch, Rejected
from pipeline.settings import ReadSettings, StoreSettings
from pipeline.storage.block_cache import BlockCache
from pipeline.storage.cells import BadCell, read_messages, read_sampling, read_text
from pipeline.storage.columns import ColumnMap, find_columns
from pipeline.storage.input_files import InputFile, find_input_files
from pipeline.storage.json_lines import is_json_lines
from pipeline.storage.parquet_copies import ParquetCopies
from pipeline.storage.parquet_input import ParquetInput
from pipeline.storage.partitions import read_partitions
from pipeline.storage.plain_types import python_rows
from pipeline.storage.prompt_template import PromptTemplate

_CACHE_BYTES = 256 << 20
Content = str | list[Message]
# What turns a cell, or the cells of a template, into content; and the error where it fails.
Parser = tuple[Callable[[Any], Content], str]


@dataclass(frozen=True, eq=False)
class PromptSource:
    """A frozen view of the input. Row i of the job is row i of the files in order.

    `schema` has plain types (`plain_types`). `_first_row[b]` is the row at which block
    b of all files together begins: [blocks + 1]. `summary`: which files it was found in, where that
    has to be said. `_field_order`: see `with_field_order`.
    """

    num_rows: int
    schema: pa.Schema
    columns: ColumnMap
    _files: tuple[ParquetInput, ...]
    _labels: tuple[str, ...]
    _first_row: NDArray[np.int64]
    _template: PromptTemplate | None = None
    summary: str = ""
    _field_order: NDArray[np.uint8] | None = None
    _cache: BlockCache = field(default_factory=lambda: BlockCache(_CACHE_BYTES))

    @property
    def labels(self) -> tuple[str, ...]:
        """What ids of rows without one begin with: a name for each file."""
        return self._labels

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns whose order in the prompt is free: those in a template's `fields(...)`."""
        return () if self._template is None else self._template.fields

    def with_field_order(self, order: NDArray[np.uint8]) -> PromptSource:
        """The same rows with `fields` in another order: [rows, fields] places in `fields`."""
        return replace(self, _field_order=order)

    def iter_fields(self) -> Iterator[pl.DataFrame]:
        """The columns `fields` of all rows, in batches. Raises InputError on a damaged page."""
        for file, _, start, stop in self._file_ranges():
            for table in file.iter_batches(self.fields, stop - start):
                yield pl.DataFrame(table)

    def iter_prompts(self, first_row: int = 0) -> Iterator[PromptBatch]:
        """All rows in order, in batches of at most `parquet_input.BATCH_ROWS`.

        Batches that end before `first_row` are left out; it must be where a batch begins.

        Raises InputError on a damaged page or a row without an id.
        """
        for file, label, start, stop in self._file_ranges():
            row = start
            for table in file.iter_batches(self.columns.names, stop - start):
                if row >= first_row:
                    ids = self._read_ids(table, file, label, row - start)
                    contents = self._contents(table, row)
                    yield _make_batch(table, self.columns, ids, row, contents, self._parser())
                row += table.num_rows

    def take(self, row_indices: NDArray[np.int64]) -> pa.Table:
        """All columns of these rows, in the order given: a table of `schema`, [len(row_indices)].

        Raises InputError on a damaged page, IndexError for a row that is not there.
        """
        rows = np.asarray(row_indices, np.int64)
        if not len(rows):
            return self.schema.empty_table()
        if not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows must lie in [0, {self.num_rows})")
        block_of_row = np.searchsorted(self._first_row, rows, side="right") - 1
        # Block by block in file order, and then back into the order asked for.
        by_block = np.argsort(rows, kind="stable")
        blocks, counts = np.unique(block_of_row, return_counts=True)
        pieces: list[pa.Table] = []
        wanted = {
            block: rows[chosen] - self._first_row[block]
            for block, chosen in zip(
                blocks.tolist(), np.split(by_block, np.cumsum(counts)[:-1]), strict=True
            )
        }
        for taken in self._take_from_blocks(wanted):
            pieces.append(taken.select(self.schema.names))  # each file has an order of its own
        table = pa.concat_tables(pieces)
        if (by_block[1:] > by_block[:-1]).all():
            return table
        inverse = np.empty(len(rows), np.int64)
        inverse[by_block] = np.arange(len(rows))
        return table.take(pa.array(inverse))

    def check_carried_columns(self) -> None:
        """Read the columns that planning skips, so that damage shows before the device is used.

        Raises InputError on a damaged page or text that is not UTF-8.
        """
        carried = [name for name in self.schema.names if name not in self.columns.names]
        if not carried:
            return
        for file, _, start, stop in self._file_ranges():
            for _table in file.iter_batches(carried, stop - start):
                pass

    def fingerprint(self) -> str:
        """sha256 over the bytes of all files and the number of rows used; read once.

        Of names what folders say as `key=value` matters and, of several files, which they are.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"rows={self.num_rows}\n".encode())
        if len(self._files) > 1:
            digest.update(repr(self._labels).encode(errors="surrogateescape"))
        for file in self._files:
            digest.update(file.content_hash())
        return digest.hexdigest()

    def _file_ranges(self) -> Iterator[tuple[ParquetInput, str, int, int]]:
        """Each file in use, its label, and the rows `[start, stop)` of the job that it holds."""
        start = 0
        for file, label in zip(self._files, self._labels, strict=True):
            stop = min(self.num_rows, start + int(file.group_rows.sum()))
            if stop > start:
                yield file, label, start, stop
            start = stop

    def _read_ids(
        self, table: pa.Table, file: ParquetInput, label: str, row_in_file: int
    ) -> list[str]:
        if self.columns.id is None:
            groups, rows = file.places(row_in_file, row_in_file + table.num_rows)
            places = zip(groups.tolist(), rows.tolist(), strict=True)
            return [f"{label}:{group}:{row}" for group, row in places]
        column = table.column(self.columns.id)
        if column.null_count:
            row = row_in_file + column.is_null().to_pylist().index(True)
            raise InputError(
                f"row {row} of {file.origin.name} has no id; "
                f"fill or drop the column {self.columns.id!r}"
            )
        try:
            ids: list[str] = column.cast(pa.large_string()).to_pylist()
        except (pa.ArrowException, UnicodeError) as error:
            raise InputError(
                f"column {self.columns.id!r} of {file.origin.name} has the type {column.type}, "
                "which does not turn into text; convert it"
            ) from error
        return ids

    def _contents(self, table: pa.Table, row_start: int) -> list[Any]:
        """What each row's prompt is made of: a cell, or what `PromptTemplate` made of its cells."""
        if self._template is None:
            cells: list[Any] = table.column(
                self.columns.prompt or self.columns.messages
            ).to_pylist()
            return cells
        rows = python_rows(table.select(list(self._template.columns)))
        if self._field_order is None:
            return list(self._template.render_all([(row, None) for row in rows]))
        order = self._field_order[row_start : row_start + len(rows)].tolist()
        return list(self._template.render_all(list(zip(rows, order, strict=True))))

    def _parser(self) -> Parser:
        if self._template is not None:
            return _read_rendered, "TemplateError"
        if self.columns.messages is not None:
            return read_messages, "BadMessages"
        return lambda cell: read_text(str(cell)), "EmptyPrompt"

    def _take_from_blocks(self, wanted: dict[int, NDArray[np.int64]]) -> Iterator[pa.Table]:
        """These rows, ascending, of these blocks; a block is kept where there is room for it."""
        first_block = np.cumsum([0] + [len(file.first_group) - 1 for file in self._files])
        blocks = np.array(sorted(wanted), np.int64)
        files = np.searchsorted(first_block, blocks, side="right") - 1
        for number in np.unique(files).tolist():
            file, low = self._files[number], int(first_block[number])
            with file.open_blocks() as read_block:
                for block in blocks[files == number].tolist():
                    read = partial(read_block, block - low)
                    most = file.most_kept_bytes
                    yield from self._cache.take(block, wanted[block], read, most)


def open_source(
    path: str | Path,
    settings: ReadSettings,
    store: StoreSettings | None = None,
    copies: ParquetCopies | None = None,
) -> PromptSource:
    """Open a file, a folder of files, or a glob; of Parquet footers are read, rows are not.

    `store` is how an `s3://` URL is reached; `copies`: where JSON lines files are kept as Parquet;
    without, they are refused.

    Raises NoInput: nothing there, no rows. InputError: not Parquet, truncated, a line that is no
    row, columns missing or of the wrong type, files that differ in their columns. StorageError
    where a copy cannot be kept.
    """
    if copies is not None:
        copies.drop_stale()
    found = find_input_files(path, store)
    files = _open_files(path, found.files, copies)
    schema = files[0].schema
    for file in files[1:]:
        _check_same_schema(files[0], file)
    template = _read_template(settings, schema.names)
    asked = None if template is None else template.columns
    columns = find_columns(schema, settings, files[0].origin.name, asked)
    block_rows = np.concatenate([file.block_rows for file in files])
    first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(block_rows)])
    num_rows = int(first_row[-1])
    if num_rows == 0:
        raise NoInput(f"{path} holds no rows; check how it was written")
    if settings.limit is not None:
        num_rows = min(num_rows, settings.limit)
    labels = _make_labels([file.origin for file in files])
    return PromptSource(
        num_rows, schema, columns, files, labels, first_row, template, found.summary
    )


def _open_files(
    path: str | Path, found: Sequence[InputFile], copies: ParquetCopies | None
) -> tuple[ParquetInput, ...]:
    """All files of the input, with the columns that their folders stand for."""
    folders = read_partitions(path, [file.name for file in found])
    opened = []
    for row, file in enumerate(found):
        values = {name: folders.column(name)[row] for name in folders.column_names}
        opened.append(_open_file(file, copies).with_constants(values))
    return tuple(opened)


def _open_file(file: InputFile, copies: ParquetCopies | None) -> ParquetInput:
    if copies is None or not is_json_lines(file.base_name):
        return ParquetInput.open(file)
    return copies.open(file)


def _read_template(settings: ReadSettings, columns: list[str]) -> PromptTemplate | None:
    if settings.template is None:
        return None
    if settings.prompt_column or settings.messages_column:
        raise UsageError("--template makes the prompt: drop --prompt-column and --messages-column")
    return PromptTemplate.read(settings.template, columns)


def find_duplicate_ids(ids: pl.Series, at_most: int = 5) -> list[str]:
    """The first few ids that occur more than once, in order of appearance."""
    twice = ids.filter(ids.is_duplicated())
    found: list[str] = twice.unique(maintain_order=True).head(at_most).to_list()
    return found


def _check_same_schema(first: ParquetInput, other: ParquetInput) -> None:
    if first.schema.equals(other.schema):
        return
    ours = {f.name: f.type for f in first.schema}
    theirs = {f.name: f.type for f in other.schema}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            here, there = ours.get(name, "absent"), theirs.get(name, "absent")
            raise InputError(
                f"column {name!r} is {here} in {first.origin.name} but {there} in "
                f"{other.origin.name}; bring the files to one schema or run them one by one"
            )


def _make_labels(files: Sequence[InputFile]) -> tuple[str, ...]:
    """Base names for ids; where two are equal, paths from the folder that all files share."""
    names = tuple(file.base_name for file in files)
    if len(set(names)) == len(names):
        return names
    top = os.path.commonpath([os.path.dirname(file.path) for file in files])
    return tuple(os.path.relpath(file.path, top) for file in files)


def _make_batch(
    table: pa.Table,
    columns: ColumnMap,
    ids: list[str],
    row_start: int,
    raw: list[Any],
    parser: Parser,
) -> PromptBatch:
    def cells(name: str | None) -> list[object]:
        return [None] * len(ids) if name is None else table.column(name).to_pylist()

    contents: list[str | list[Message] | None] = []
    overrides: list[dict[str, object]] = []
    rejected: list[Rejected] = []
    rows = zip(
        raw,
        cells(columns.sampling_params),
        cells(columns.max_new_tokens),
        strict=True,
    )
    for row, (content, sampling, max_new_tokens) in enumerate(rows, row_start):
        parsed, override, fault = _read_row(content, sampling, *parser)
        if max_new_tokens is not None:
            override["max_new_tokens"] = max_new_tokens
        if fault is not None:
            rejected.append(Rejected(row, *fault))
        contents.append(parsed)
        overrides.append(override)
    tenants: list[str | None] = cells(columns.tenant)  # type: ignore[assignment]
    return PromptBatch(row_start, ids, contents, overrides, tenants, tuple(rejected))


def _read_rendered(rendered: str | BadCell) -> str:
    if isinstance(rendered, BadCell):
        raise rendered
    return read_text(rendered)


def _read_row(
    content: object, sampling: object, parse: Callable[[Any], Content], error_type: str
) -> tuple[str | list[Message] | None, dict[str, object], tuple[str, str] | None]:
    """Content, overrides and, if the row cannot run, (error_type, message) with content None."""
    if content is None:
        return None, {}, ("NullPrompt", "the prompt is null")
    try:
        parsed = parse(content)
        error_type = "BadSamplingParams"
        return parsed, {} if sampling is None else read_sampling(sampling), None
    except BadCell as error:
        return None, {}, (error_type, str(error))
