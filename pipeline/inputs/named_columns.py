"""A column found by its name, asked for or usual, or what is said where it is not there.

Knows neither types nor parts.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.errors import InputError

_MOST_NAMES = 20  # column names listed in a message


def find_column(
    schema: pa.Schema, asked: str | None, usual: tuple[str, ...], flag: str, name: str
) -> str | None:
    """The column of this name, or the first of the usual ones that is there. Raises InputError."""
    if asked is None:
        return next((column for column in usual if column in schema.names), None)
    if asked not in schema.names:
        raise InputError(
            f"{name} has no column {asked!r} (it has {listed(schema)}); correct {flag}"
        )
    return asked


def listed(schema: pa.Schema) -> str:
    """The names of the columns, or of the first of them, for a message."""
    names = [repr(column) for column in schema.names[:_MOST_NAMES]]
    more = len(schema.names) - len(names)
    return (", ".join(names) or "no column at all") + (f" and {more} more" if more > 0 else "")
