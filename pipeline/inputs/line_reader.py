"""JSON lines, or items of a JSON list, as objects of a bearable size. Knows no column's type."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

from pipeline.errors import InputError
from pipeline.inputs.array_reader import LONGEST, MOST_VALUES, is_list, read_items
from pipeline.inputs.input_files import InputFile, damage_named
from pipeline.inputs.refused_lines import Line, place_of

_ROWS_AT_A_TIME = 4096
_BYTES_AT_A_TIME = 8 << 20  # of lines; parsed they take some ten times that
_LONGEST_LINE = LONGEST
_MOST_FIELDS = 50_000  # of all lines together
_MOST_CELLS = 4_000_000  # of a batch: a field that a line lacks takes room there too
_READ_AT_A_TIME = 1 << 20
_LISTS = (".json", ".json.gz")  # which may also be JSON lines


def read_batches(source: InputFile, num_fields: int = 1) -> Iterator[list[Line]]:
    """Lines in batches that are bounded by rows, bytes and cells, of at least so many fields.

    Raises InputError as `read_lines`, and where all lines together have too many fields.
    """
    batch: list[Line] = []
    names: set[str] = set()
    size = 0
    for number, line, num_bytes in _read_objects(source):
        batch.append((number, line))
        names.update(line)
        check_fields(source, len(names), number)
        size += num_bytes
        cells = len(batch) * max(num_fields, len(names))
        if len(batch) >= _ROWS_AT_A_TIME or size >= _BYTES_AT_A_TIME or cells >= _MOST_CELLS:
            yield batch
            batch, names, size = [], set(), 0
    if batch:
        yield batch


def read_lines(source: InputFile) -> Iterator[Line]:
    """All lines. Raises InputError naming the first that is no JSON object of a bearable size."""
    return ((number, line) for number, line, _ in _read_objects(source))


def _read_objects(source: InputFile) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(number from 1, object, its size as text)."""
    with damage_named(source.name), source.open_stream() as stream:
        lines = io.BufferedReader(stream, _READ_AT_A_TIME)
        if source.base_name.endswith(_LISTS) and is_list(lines):
            yield from read_items(source.name, lines, partial(_refuse_constant, source))
            return
        for number, text in _read_texts(source.name, lines):
            yield number, _object(source, number, text), len(text)


def _read_texts(name: str, lines: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes); empty lines are skipped."""
    for number in count(1):
        text = lines.readline(_LONGEST_LINE)
        if len(text) == _LONGEST_LINE:
            raise InputError(
                f"line {number} of {name} is longer than {_LONGEST_LINE:,} bytes; split it, or "
                "write the rows as Parquet"
            )
        if not text:
            return
        if text.strip():
            yield number, text


def _object(source: InputFile, number: int, text: bytes) -> dict[str, Any]:
    if len(text) > MOST_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise InputError(
            f"{place_of(source.name, number)} holds over {MOST_VALUES:,} values; split it"
        )
    try:
        refuse = partial(_refuse_constant, source, number)
        value = json.loads(text.removeprefix(codecs.BOM_UTF8), parse_constant=refuse)
    except RecursionError:
        raise InputError(
            f"{place_of(source.name, number)} has lists or objects too deep in one another; put "
            "them into one field as text"
        ) from None
    except ValueError:  # UnicodeDecodeError is one
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{place_of(source.name, number)} is not a JSON object in UTF-8")
    return value


def _refuse_constant(source: InputFile, number: int, name: str) -> float:
    """NaN or Infinity, which Python and JavaScript write."""
    raise InputError(
        f"{place_of(source.name, number)} holds {name}, which JSON does not have; write null "
        "instead"
    )


def check_fields(source: InputFile, num_fields: int, number: int) -> None:
    """Raises InputError where the lines up to this number have too many different fields."""
    if num_fields > _MOST_FIELDS:
        raise InputError(
            f"the lines of {source.name} have over {_MOST_FIELDS:,} different fields by line "
            f"{number}; put what has names of its own into one field as text"
        )
