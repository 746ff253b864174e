"""Types without their encoding, so that equal columns of two files are of one type. Knows no roles.

Dictionaries and views are decoded and offsets have 64 bits, which cannot overflow.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FIXED_OFFSET = re.compile(r"[+-]\d\d:?\d\d|Z")
_MOST_DIGITS = 38  # of a decimal of 128 bits


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The plain type of every column; metadata and nullability dropped."""
    return pa.schema([pa.field(f.name, plain_type(_without_view(f.type))) for f in schema])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """See the module; a list view inside of another type stays, since Arrow cannot cast it."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if is_text(kind) and not isinstance(kind, pa.JsonType):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_decimal256(kind) and kind.precision <= _MOST_DIGITS:
        return pa.decimal128(kind.precision, kind.scale)
    return _rebuild(kind, plain_type)


def without_inner_nulls(kind: pa.DataType) -> pa.DataType:
    """With text for every type within it that has no value but null.

    Arrow's cast of such a type to itself leaves it too short (seen in 26.0, in slices).
    """

    def change(inner: pa.DataType) -> pa.DataType:
        return pa.large_string() if pa.types.is_null(inner) else _rebuild(inner, change)

    return _rebuild(kind, change)


def carried_type(kind: pa.DataType) -> pa.DataType:
    """A plain type as the output has it: times with a fixed offset are the same instants in UTC.

    Polars, which counts what a run has written, knows no time zone without a name.
    """
    if pa.types.is_timestamp(kind) and kind.tz and _FIXED_OFFSET.fullmatch(kind.tz):
        return pa.timestamp(kind.unit, "UTC")
    return _rebuild(kind, carried_type)


def _python_type(kind: pa.DataType) -> pa.DataType:
    """A plain type whose values Python's own types can hold: it has no nanoseconds.

    Bytes are text here: many tables have texts without the mark that says so.
    """
    if _is_binary(kind):
        return pa.large_string()
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind):
        return pa.time64("us")
    return _rebuild(kind, _python_type)


def _rebuild(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A nested type with the types inside of it changed; any other as it is."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(change(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(change(kind.value_type), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(change(kind.key_type), change(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, change(f.type)) for f in kind])
    return kind


def plain_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the types that the plain `schema` has for its columns. Raises ArrowException."""
    fields = [schema.field(name) for name in table.column_names]
    columns = [
        (_decode_views(column) if _is_list_view(column.type) else column).cast(field.type)
        for field, column in zip(fields, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


UNREADABLE: Any = object()
"""Stands for a value that Python's own types cannot hold."""


def python_cells(column: pa.ChunkedArray) -> list[Any]:
    """The values of a plain column, UNREADABLE where Python's types cannot hold one.

    Of times the nanoseconds are cut off, and bytes in UTF-8 are text.
    """
    kind = _python_type(column.type)
    try:
        if kind != column.type:
            column = column.cast(options=pc.CastOptions(kind, allow_time_truncate=True))
        cells: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        if len(column) == 1:
            return [UNREADABLE]
        return [cell for at in range(len(column)) for cell in python_cells(column.slice(at, 1))]
    return cells


def text_of(column: pa.ChunkedArray) -> list[str | None]:
    """Scalars as text, as Arrow writes them, or a UUID as everybody does; None: null or no text."""
    if isinstance(column.type, pa.UuidType):
        return [None if value is None else str(value) for value in column.to_pylist()]
    try:
        texts: list[str | None] = column.cast(pa.large_string()).to_pylist()
    except (pa.ArrowException, UnicodeError):
        if len(column) == 1:
            return [None]
        return [text for at in range(len(column)) for text in text_of(column.slice(at, 1))]
    return texts


def holds_dictionary(kind: pa.DataType) -> bool:
    """Whether there is a dictionary inside of the type."""
    inner = [kind.field(n).type for n in range(kind.num_fields)]
    return any(pa.types.is_dictionary(part) or holds_dictionary(part) for part in inner)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, in any layout but a dictionary, or text that is marked as JSON."""
    if isinstance(kind, pa.JsonType):
        kind = kind.storage_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _without_view(kind: pa.DataType) -> pa.DataType:
    return pa.large_list(kind.value_type) if _is_list_view(kind) else kind


def _decode_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = _without_view(column.type)
    return pa.chunked_array([_decode_view(chunk).cast(kind) for chunk in column.chunks], kind)


def _decode_view(views: pa.Array) -> pa.LargeListArray:
    """By hand: Arrow's own cast leaves out the last offset (seen in 26.0)."""
    sizes = pc.fill_null(pc.list_value_length(views), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    missing = views.is_null() if views.null_count else None
    return pa.LargeListArray.from_arrays(pa.array(offsets), views.flatten(), mask=missing)
