"""Why a row of the input cannot run. Knows no prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell
from pipeline.storage.plain_types import UNREADABLE

Value = TypeVar("Value")


class Fault(Exception):
    """Why a row cannot run: the type of its error, and a sentence."""


Faults = dict[int, Fault]


BEYOND = (
    "a value of the row is beyond what can be read: a time after the year 9999, or bytes that are "
    "not text in UTF-8"
)


def each(read: Callable[[Any], Value], cells: Sequence[Any], faults: Faults) -> list[Any]:
    """What `read` makes of each cell, None where it raises Fault or there is one already."""
    found: list[Any] = [None] * len(cells)
    for row, cell in enumerate(cells):
        if row not in faults:
            try:
                found[row] = read(cell)
            except Fault as fault:
                faults[row] = fault
    return found


def attempt(error_type: str, read: Callable[[Any], Value], cell: Any) -> Value:
    """What `read` makes of a cell. Raises Fault, whatever it raises but UsageError."""
    if cell is UNREADABLE:
        raise Fault(error_type, BEYOND)
    try:
        return read(cell)
    except BadCell as error:
        raise Fault(error_type, str(error)) from None
    except UsageError:
        raise
    except Exception as error:  # what it is we cannot know; what it says may quote the row
        raise Fault(error_type, f"the row cannot be read ({type(error).__name__})") from None
