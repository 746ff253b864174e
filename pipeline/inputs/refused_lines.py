"""Lines of JSON that no row can say, as rows with a reason. Knows no files.

A value that fits into no column by itself (half a surrogate pair, a number of more than 64 bits) is
its line's fault. Lines that differ from each other are the file's:
whose fault it is nobody can say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.columns import REFUSED_COLUMN

MISFITS = (pa.ArrowException, TypeError, OverflowError, UnicodeError)
"""What Arrow raises where values do not fit into a column."""
Line = tuple[int, dict[str, Any]]
"""Number from 1, object."""
_IN_LISTS = (".json", ".json.gz")


def place_of(name: str, number: int) -> str:
    """How a message calls the line of a file, or the item of one that is a list."""
    return f"{'item' if name.endswith(_IN_LISTS) else 'line'} {number} of {name}"


class RefusedLines:
    """Whether any line is a row."""

    def __init__(self) -> None:
        self._reasons = 0
        self._first = ""

    def count(self, table: pa.Table) -> None:
        """Note which rows of `table` have a reason."""
        if REFUSED_COLUMN not in table.column_names:
            return
        reasons = table.column(REFUSED_COLUMN).drop_null()
        if len(reasons) and not self._reasons:
            self._first = str(reasons[0])
        self._reasons += len(reasons)

    def check(self, num_rows: int) -> None:
        """Raises InputError, with the first line's reason, where none of the lines is a row."""
        if num_rows and self._reasons == num_rows:
            raise InputError(self._first)


def without_misfits(name: str, lines: Sequence[Line]) -> list[Line]:
    """The lines, without what fits into no column, and then with the reason. `name`: the file."""
    return [(number, _without_misfits(name, number, line)) for number, line in lines]


def _without_misfits(name: str, number: int, line: dict[str, Any]) -> dict[str, Any]:
    bad = [field for field, value in line.items() if not _fits({field: value})]
    if not bad:
        return line
    fields = f"field{'s' if len(bad) > 1 else ''} {', '.join(map(repr, bad))}"
    reason = f"the {fields} of {place_of(name, number)} cannot be a value of a column"
    left = {field: value for field, value in line.items() if field not in bad}
    return left | {REFUSED_COLUMN: reason}


def _fits(line: dict[str, Any]) -> bool:
    try:
        pa.array([line])
    except MISFITS:
        return False
    return True


def without_fields(lines: list[Line], fields: set[str]) -> list[Line]:
    """The lines without these fields."""
    if not fields:
        return lines
    return [(n, {f: line[f] for f in line if f not in fields}) for n, line in lines]


def with_json_text(lines: Sequence[Line], fields: Sequence[str]) -> list[Line]:
    """The lines with these fields as JSON text."""
    return [
        (number, line | {f: json.dumps(line[f]) for f in fields if line.get(f) is not None})
        for number, line in lines
    ]


def is_text_value(value: str) -> bool:
    """Whether a text that JSON spelled is one: no half surrogate pair."""
    return _fits({"": value})
