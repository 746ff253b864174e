"""The rows of a CSV file as lists of cells, each as wide as the header. Knows no types.

Quotes are those of RFC 4180 (what spreadsheets write): a cell with the delimiter, quotes or line
breaks stands in double quotes, and a quote in it is written twice. What separates cells is the one
of four characters that the header has most of. Text is UTF-8, or UTF-16 where a mark says so.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from pipeline.errors import InputError
from pipeline.inputs.array_reader import LONGEST
from pipeline.inputs.input_files import InputFile, damage_named

_READ_AT_A_TIME = 1 << 20
_DELIMITERS = (",", ";", "\t", "|")
_QUOTED = re.compile('"[^"]*"?')
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MOST_COLUMNS = 50_000


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not as wide as the header, or badly quoted; the message does not quote it."""

    message: str


@dataclass
class CsvRows:
    """One pass over a file. `names`: of its columns; iterate it for its rows, bad ones as well.

    Raises InputError where the whole file is at fault: no header, no text, a quote without its end.
    """

    source: InputFile
    names: list[str] = field(init=False, default_factory=list)

    def __iter__(self) -> Iterator[list[str] | BadRow]:
        with damage_named(self.source.name), self.source.open_stream() as stream:
            buffer = io.BufferedReader(stream, _READ_AT_A_TIME)
            text = io.TextIOWrapper(buffer, _encoding(buffer), "surrogateescape", newline="")
            yield from self._rows(text)

    def _rows(self, text: TextIO) -> Iterator[list[str] | BadRow]:
        first = text.readline(LONGEST)
        if not first.strip():
            raise InputError(
                f"{self.source.name} has no header in its first line; write the names of its "
                "columns there"
            )
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
        lines = _Lines(self.source.name, first, text)
        rows = csv.reader(lines, delimiter=self._delimiter(first), strict=True)
        while True:
            begin = lines.begin_row()
            cells: list[str] | BadRow | None
            try:
                cells = next(rows, None)
            except csv.Error as error:
                cells = self._bad(begin, lines, error)
            if cells is None:
                return
            if not isinstance(cells, BadRow):
                _check_text(self.source.name, begin, cells)
            if not self.names:
                self._take_header(cells)
            elif isinstance(cells, BadRow) or len(cells) == len(self.names):
                yield cells
            elif cells:
                yield self._not_as_wide(begin, len(cells))

    def _delimiter(self, header: str) -> str:
        if self.source.base_name.endswith((".tsv", ".tsv.gz")):
            return "\t"
        found = Counter(_QUOTED.sub("", header))
        return max(_DELIMITERS, key=lambda mark: found[mark])

    def _take_header(self, cells: list[str] | BadRow) -> None:
        if isinstance(cells, BadRow):
            raise InputError(cells.message)
        if len(cells) > _MOST_COLUMNS:
            raise InputError(f"{self.source.name} has over {_MOST_COLUMNS:,} columns; drop some")
        self.names = [name or f"column_{number}" for number, name in enumerate(cells, 1)]
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise InputError(
                f"{self.source.name} has the column {twice[0]!r} twice; rename one of the two"
            )

    def _bad(self, begin: int, lines: _Lines, error: csv.Error) -> BadRow:
        """Raises InputError where nobody can say which rows are lost."""
        where = f"the row that begins in line {begin} of {self.source.name}"
        if lines.is_read:
            raise InputError(
                f"{where} has a quote that does not end; write a quote within a cell twice"
            ) from None
        return BadRow(f"{where} has text behind a quoted cell; write a quote within a cell twice")

    def _not_as_wide(self, begin: int, width: int) -> BadRow:
        return BadRow(
            f"the row that begins in line {begin} of {self.source.name} has {width:,} "
            f"{'cell' if width == 1 else 'cells'} where the header has {len(self.names):,}; put "
            "cells with delimiters, quotes or line breaks into double quotes"
        )


class _Lines:
    """Lines of rows of a bearable length, and the number of the last one; `is_read`: there is no
    other."""

    def __init__(self, name: str, first: str, rest: TextIO) -> None:
        self.number = 0
        self.is_read = False
        self._begin, self._length = 1, 0
        self._name = name
        self._first = first
        self._rest = rest

    def begin_row(self) -> int:
        """The number of the line that comes next."""
        self._begin, self._length = self.number + 1, 0
        return self._begin

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self._first = self._first or self._rest.readline(LONGEST), ""
        if not line:
            self.is_read = True
            raise StopIteration
        self.number += 1
        self._length += len(line)
        if self._length >= LONGEST:
            raise InputError(
                f"the row that begins in line {self._begin} of {self._name} is longer than "
                f"{LONGEST:,} characters; a quote in it may lack its end"
            )
        return line


def _encoding(stream: io.BufferedReader) -> str:
    start = stream.peek(_READ_AT_A_TIME)[:3]
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def _check_text(name: str, number: int, cells: list[str]) -> None:
    """Raises InputError where a cell has bytes that are no text: other rows then may as well."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"line {number} of {name} is not text in UTF-8; convert the file, like one of Western "
            "Windows by iconv -f CP1252 -t UTF-8"
        ) from None
