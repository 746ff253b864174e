"""CSV files as tables: cells get the types that all cells of a column agree on. Knows no prompts.

A CSV file says no types, so a column is text unless nothing is lost by another one: whole numbers
and decimals in their shortest form, which read back as they are written (`7`, `0.5`; not `007`, not
`0.50`). What coppice takes for text is text (`prompt`, `id`, ...), and what it takes for a number
is one however it is written (`temperature`, ...). An empty cell is null.
Where some cells of such a column are numbers, a row with another one there is refused.

The file is read twice: the last row may be the one that is no number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.generation import ROW_RULES
from pipeline.inputs.columns import REFUSED_COLUMN
from pipeline.inputs.csv_rows import BadRow, CsvRows
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.request_fields import LIMITS

CSV_ENDINGS: Final = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_ROWS_AT_A_TIME = 4096
_CHARACTERS_AT_A_TIME = 8 << 20
_TEXTS: Final = frozenset(
    (
        "prompt", "messages", "segments", "documents", "id", "custom_id", "sampling_params",
        "tenant", "conversation_id", "stop", "choices", "continuation", "regex", "grammar",
        "json_schema", "response_format", "bad_words", "stop_token_ids", "allowed_token_ids",
        REFUSED_COLUMN,
    )
)  # fmt: skip
NUMBERS: Final = frozenset(
    (
        *LIMITS, *ROW_RULES, "temperature", "top_p", "top_k", "seed", "presence_penalty",
        "frequency_penalty", "min_tokens", "logprobs", "top_logprobs", "best_of", "turn",
        "thinking_budget", "thinking_token_budget",
    )
)  # fmt: skip
"""Columns that are numbers however they are written."""
_SWITCHES: Final = frozenset(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"))
_WHOLE = r"^(0|-?[1-9][0-9]{0,18})$"  # in its shortest form
_DECIMAL = r"^-?[0-9]{1,15}\.[0-9]{1,15}$"
_NUMBER = r"^-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_SWITCH = r"^(?i:true|false)$"


def read_csv(
    source: InputFile, keeps_refused: bool, as_text: Collection[str]
) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """The schema of a file, and its rows in batches; see `text_files.write_rows`.

    Raises InputError, also for a bad row unless `keeps_refused`.
    """
    rows = CsvRows(source)
    columns: list[_Column] = []
    has_bad = False
    for batch in _batches(rows):
        if not columns:
            columns = [_Column.of(name, as_text) for name in rows.names]
        has_bad |= any(isinstance(row, BadRow) for row in batch)
        for column, cells in zip(columns, _transposed(batch), strict=False):
            column.look_at(cells)
    if not columns:
        columns = [_Column.of(name, as_text) for name in rows.names]
    has_bad |= any(column.keeps_misfits for column in columns)
    schema = pa.schema([(column.name, column.kind) for column in columns])
    if has_bad and REFUSED_COLUMN not in schema.names:
        schema = schema.append(pa.field(REFUSED_COLUMN, pa.large_string()))
    tables = _Tables(source.name, columns, schema, keeps_refused)
    return schema, tables.of(CsvRows(source))


_Batch = list[list[str] | BadRow]


def _batches(rows: CsvRows) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 0 if isinstance(row, BadRow) else sum(map(len, row))
        if len(batch) >= _ROWS_AT_A_TIME or size >= _CHARACTERS_AT_A_TIME:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _transposed(batch: _Batch) -> Iterator[tuple[str, ...]]:
    """The cells of each column, without those of bad rows."""
    return zip(*(row for row in batch if not isinstance(row, BadRow)), strict=True)


@dataclass
class _Column:
    """What the cells so far leave open: the first of `_open` is what the column will be, and text
    where none is left. `wanted`: what cells of a field of a request match; of others nothing is
    wanted, and each of them counts."""

    name: str
    _open: list[tuple[str, pa.DataType]]
    wanted: str = ""
    has_misfits: bool = False
    _is_empty: bool = True

    @classmethod
    def of(cls, name: str, as_text: Collection[str]) -> _Column:
        numbers = [(_WHOLE, pa.int64()), (_NUMBER, pa.float64())]
        if name in _TEXTS or name in as_text:
            return cls(name, [])
        if name in _SWITCHES:
            return cls(name, [(_SWITCH, pa.bool_())], _SWITCH)
        if name == "logprobs":  # of a request of either endpoint
            return cls(name, [(_SWITCH, pa.bool_()), *numbers])
        if name in NUMBERS:
            return cls(name, numbers, "" if name == "turn" else _NUMBER)
        return cls(name, [(_WHOLE, pa.int64()), (_DECIMAL, pa.float64())])

    @property
    def kind(self) -> pa.DataType:
        """Null where there is no value, and nobody takes it for text."""
        if not self._open:
            return pa.large_string()
        if self._is_empty:
            return pa.large_string() if self.has_misfits else pa.null()
        return self._open[0][1]

    def look_at(self, cells: tuple[str, ...]) -> None:
        """Drop what one of the cells is not."""
        if not self._open:
            return
        said = pa.array([cell for cell in cells if cell], pa.large_string())
        if self.wanted:
            fits = pc.match_substring_regex(said, self.wanted)
            self.has_misfits |= not pc.all(fits, min_count=0).as_py()
            said = said.filter(fits)
        if len(said):
            self._is_empty = False
            self._open = [(p, kind) for p, kind in self._open if _are_all(said, p)]

    @property
    def keeps_misfits(self) -> bool:
        """Whether it has a type that some of its cells do not have."""
        return self.has_misfits and not self._is_empty

    def misfits(self, cells: tuple[str, ...]) -> list[int]:
        """Places of cells that are not what the column is, and not empty."""
        if not self.keeps_misfits:
            return []
        fits = pc.match_substring_regex(pa.array(cells, pa.large_string()), self.wanted)
        return [at for at, fit in enumerate(fits.to_pylist()) if cells[at] and not fit]


def _are_all(cells: pa.Array, pattern: str) -> bool:
    if not pc.all(pc.match_substring_regex(cells, pattern)).as_py():
        return False
    if pattern == _WHOLE:
        return _are_of_64_bits(cells)
    return pattern != _DECIMAL or _are_shortest(cells)


def _are_of_64_bits(cells: pa.Array) -> bool:
    try:
        cells.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _are_shortest(cells: pa.Array) -> bool:
    """Whether decimals are written as both Python and Arrow write them."""
    if not cells.cast(pa.float64()).cast(pa.large_string()).equals(cells):
        return False
    return all(repr(float(cell)) == cell for cell in cells.to_pylist())


@dataclass
class _Tables:
    """The rows of a file as tables. `name`: of the file, to blame."""

    name: str
    columns: list[_Column]
    schema: pa.Schema
    keeps_refused: bool

    def of(self, rows: CsvRows) -> Iterator[pa.Table]:
        """A table for each batch."""
        number = 1
        for batch in _batches(rows):
            yield self._make(number, batch)
            number += len(batch)

    def _make(self, number: int, batch: _Batch) -> pa.Table:
        """Of rows that begin with the one of this number, from 1. Raises InputError."""
        bad = {at: row.message for at, row in enumerate(batch) if isinstance(row, BadRow)}
        width = len(self.columns)
        rows = [[""] * width if isinstance(row, BadRow) else row for row in batch]
        cells = list(zip(*rows, strict=True))
        for place, column in enumerate(self.columns):
            if misfits := column.misfits(cells[place]):
                cells[place] = _without(cells[place], misfits)
                for at in misfits:
                    bad.setdefault(at, self._reason(number + at, column))
        if bad and not self.keeps_refused:
            raise InputError(bad[min(bad)])
        values = [
            _values(found, self.schema.field(place).type) for place, found in enumerate(cells)
        ]
        if REFUSED_COLUMN in self.schema.names:
            reasons = pa.array([bad.get(at) for at in range(len(batch))], pa.large_string())
            place = self.schema.get_field_index(REFUSED_COLUMN)
            own = values[place] if place < len(values) else reasons
            values[place:] = [pc.coalesce(reasons, own), *values[place + 1 :]]
        return pa.Table.from_arrays(values, schema=self.schema)

    def _reason(self, number: int, column: _Column) -> str:
        wanted = "true or false" if column.wanted == _SWITCH else "a number"
        return (
            f"row {number} of {self.name} has a cell of the column {column.name!r} that is not "
            f"{wanted}; correct it, or empty it"
        )


def _without(cells: tuple[str, ...], places: list[int]) -> tuple[str, ...]:
    left = set(places)
    return tuple("" if at in left else cell for at, cell in enumerate(cells))


def _values(cells: tuple[str, ...], kind: pa.DataType) -> pa.Array:
    if pa.types.is_null(kind):
        return pa.nulls(len(cells))
    texts = pa.array([cell or None for cell in cells], pa.large_string())
    if pa.types.is_boolean(kind):
        return pc.equal(pc.utf8_lower(texts), "true")
    return texts.cast(kind)
