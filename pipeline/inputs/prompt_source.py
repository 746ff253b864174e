"""The prompts of a job, read in a stream. Knows nothing about tokens or models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.conversation_settings import NO_CONVERSATIONS, ConversationSettings
from pipeline.errors import NoInput, UsageError
from pipeline.inputs.block_cache import BlockCache
from pipeline.inputs.carriage import check_carriage, check_types_carried
from pipeline.inputs.columns import REFUSED_COLUMN, ColumnMap, find_columns
from pipeline.inputs.common_schema import with_one_schema
from pipeline.inputs.input_files import InputFile, Stamps, find_input_files
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.parquet_input import ParquetInput
from pipeline.inputs.partitions import read_partitions
from pipeline.inputs.prompt_rows import RowReader
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.inputs.question_texts import QuestionTexts
from pipeline.inputs.row_ids import ids_of_places, make_labels
from pipeline.inputs.scored_columns import read_texts, with_choices
from pipeline.inputs.text_files import is_text_file, named_texts
from pipeline.inputs.turns import Turns, read_turns, with_turn_columns
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import PromptBatch
from pipeline.questions import Questionnaire
from pipeline.scoring_settings import NO_SCORES, ScoringSettings

_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class PromptSource:
    """A frozen view of the input. Row i of the job is row i of the files in order.

    `schema`: the columns that the output carries, with plain types (`plain_types`).
    `_first_row[b]` is the row at which block b of all files together begins: [blocks + 1].
    `labels`: what ids of rows without one begin with, a name for each file.
    `summary`: which files it was found in, where that has to be said. `_field_order`: see
    `with_field_order`. `turns`: of which conversations, where rows are turns of some.
    """

    num_rows: int
    schema: pa.Schema
    columns: ColumnMap
    _files: tuple[ParquetInput, ...]
    labels: tuple[str, ...]
    _first_row: NDArray[np.int64]
    _template: PromptTemplate | None = None
    summary: str = ""
    _field_order: NDArray[np.uint8] | None = None
    turns: Turns | None = None
    _texts: QuestionTexts | None = None
    _cache: BlockCache = field(default_factory=lambda: BlockCache(_CACHE_BYTES))

    @property
    def stamps(self) -> Stamps:
        """Of its files, by name, as they were when they were opened."""
        return {file.origin.name: file.stamp for file in self._files}

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns whose order in the prompt is free: those in a template's `fields(...)`."""
        return () if self._template is None else self._template.fields

    def with_field_order(self, order: NDArray[np.uint8]) -> PromptSource:
        """The same rows with `fields` in another order: [rows, fields] indices of `fields`."""
        return replace(self, _field_order=order)

    def with_sheet(self, sheet: Questionnaire) -> PromptSource:
        """The same rows, asked the same questions in the way of `sheet`."""
        assert self.columns.scored is not None
        scored = replace(self.columns.scored, sheet=sheet)
        return replace(self, columns=replace(self.columns, scored=scored))

    def with_answers(self, reasoning: bool, tool_calls: bool) -> PromptSource:
        """The same rows, whose answers have columns of what was thought, and of calls of tools.
        Raises InputError where the output cannot carry the input beside them."""
        if not (reasoning or tool_calls):
            return self
        columns = replace(self.columns, reasoning=reasoning, tool_calls=tool_calls)
        check_types_carried(self.schema, columns, self._files[0].origin.name)
        return replace(self, columns=columns)

    def with_turns(self) -> PromptSource:
        """The same rows as turns, where the columns say which. Raises InputError."""
        if self.columns.conversation is None:
            return self
        asked = (self.columns.conversation, self.columns.turn, self.columns.tenant)
        names = [name for name in asked if name is not None]
        return replace(self, turns=read_turns(self._iter_tables(names), self.columns))

    def iter_fields(self) -> Iterator[pl.DataFrame]:
        """The columns `fields` of all rows, in batches. Raises InputError on a damaged page."""
        yield from map(pl.DataFrame, self._iter_tables(self.fields))

    def _iter_tables(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for file, _, start, stop in self._file_ranges():
            yield from file.iter_batches(names, stop - start)

    def iter_prompts(self, first_row: int = 0) -> Iterator[PromptBatch]:
        """All rows in order, in batches of at most `parquet_input.BATCH_ROWS`.

        Batches that end before `first_row` are left out; it must be where a batch begins.

        Raises InputError on a damaged page.
        """
        reader = RowReader(self.columns, self._template, self._texts)
        for file, label, start, stop in self._file_ranges():
            row = start
            for table in file.iter_batches(self.columns.names, stop - start):
                end = row + table.num_rows
                if row >= first_row:
                    make_ids = partial(ids_of_places, file, label, row - start, end - start)
                    order = self._field_order
                    orders = None if order is None else order[row:end].tolist()
                    batch = reader.read(table, row, make_ids, orders)
                    yield batch if self.turns is None else self.turns.apply(batch)
                row = end

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
        wanted = {
            block: rows[chosen] - self._first_row[block]
            for block, chosen in zip(
                blocks.tolist(), np.split(by_block, np.cumsum(counts)[:-1]), strict=True
            )
        }
        taken = self._take_from_blocks(wanted)  # each file has columns in an order of its own
        table = pa.concat_tables(piece.select(self.schema.names) for piece in taken)
        if (by_block[1:] > by_block[:-1]).all():
            return table
        inverse = np.empty(len(rows), np.int64)
        inverse[by_block] = np.arange(len(rows))
        return table.take(pa.array(inverse))

    def check_carried_columns(self) -> None:
        """Read the columns that planning skips, so that damage shows before the device is used.

        Raises InputError on a damaged page, text that is not UTF-8, and a first row that does not
        come back from the output.
        """
        carried = [name for name in self.schema.names if name not in self.columns.names]
        if not carried:
            return
        for file, _, start, stop in self._file_ranges():
            for row, table in enumerate(file.iter_batches(carried, stop - start), start):
                if row == 0:
                    check_carriage(table.slice(0, 1), self.columns, file.origin.name)

    def fingerprint(self) -> str:
        """sha256 over the bytes of all files and the number of rows used; read once.

        Of names what folders say as `key=value` matters and, of several files, which they are.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"rows={self.num_rows}\n".encode())
        if len(self._files) > 1:
            digest.update(repr(self.labels).encode(errors="surrogateescape"))
        for file in self._files:
            digest.update(file.content_hash())
        return digest.hexdigest()

    def _file_ranges(self) -> Iterator[tuple[ParquetInput, str, int, int]]:
        """Each file in use, its label, and the rows `[start, stop)` of the job that it holds."""
        start = 0
        for file, label in zip(self._files, self.labels, strict=True):
            stop = min(self.num_rows, start + int(file.group_rows.sum()))
            if stop > start:
                yield file, label, start, stop
            start = stop

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
    location: Location,
    settings: ReadSettings,
    copies: ParquetCopies | None = None,
    wants_segments: bool = False,
    conversations: ConversationSettings = NO_CONVERSATIONS,
    scoring: ScoringSettings = NO_SCORES,
) -> PromptSource:
    """Open a file, a folder of files, or a glob; of Parquet footers are read, rows are not.

    `copies`: where JSON and CSV files are kept as Parquet; without, they are refused.
    `wants_segments`: see `find_columns`; `conversations`: see `with_turn_columns`; `scoring`: see
    `with_choices`.

    Raises NoInput: nothing there, no rows. InputError: not Parquet, truncated, a line that is no
    row, columns missing or of the wrong type, files that differ in their columns. StorageError
    where a copy cannot be kept.
    """
    if copies is not None:
        copies.drop_stale()
        copies = copies.reading_as_text(named_texts(settings, conversations, scoring))
    found = find_input_files(location)
    files = with_one_schema(_open_files(location, found.files, copies))
    schema = files[0].schema
    template = _read_template(settings, schema.names)
    asked = None if template is None else template.columns
    columns = find_columns(schema, settings, files[0].origin.name, asked, wants_segments)
    columns = with_turn_columns(columns, schema, conversations, files[0].origin.name)
    texts = read_texts(scoring, schema)
    columns = with_choices(columns, schema, scoring, files[0].origin.name, texts)
    block_rows = np.concatenate([file.block_rows for file in files])
    first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(block_rows)])
    num_rows = int(first_row[-1])
    if num_rows == 0:
        raise NoInput(f"{location} holds no rows; check how it was written")
    if settings.limit is not None:
        num_rows = min(num_rows, settings.limit)
    labels = make_labels([file.origin for file in files])
    schema = pa.schema([field for field in schema if field.name != REFUSED_COLUMN])
    check_types_carried(schema, columns, files[0].origin.name)
    return PromptSource(
        num_rows, schema, columns, files, labels, first_row, template, found.summary, _texts=texts
    )


def _open_files(
    location: Location, found: Sequence[InputFile], copies: ParquetCopies | None
) -> tuple[ParquetInput, ...]:
    """All files of the input, with the columns that their folders stand for."""
    folders = read_partitions(location.path, [file.name for file in found])
    opened = []
    for row, file in enumerate(found):
        values = {name: folders.column(name)[row] for name in folders.column_names}
        is_text = is_text_file(file.base_name)
        parquet = copies.open(file) if copies and is_text else ParquetInput.open(file)
        opened.append(parquet.with_constants(values))
    return tuple(opened)


def _read_template(settings: ReadSettings, columns: list[str]) -> PromptTemplate | None:
    if settings.template is None:
        return None
    for part in ("prompt", "messages", "segments", "documents"):
        if getattr(settings, f"{part}_column"):
            raise UsageError(f"--template makes the prompt: drop --{part}-column")
    return PromptTemplate.read(settings.template, columns)
