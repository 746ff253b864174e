"""How many rows of a row group may be decoded at once, and tables in slices of bounded size.

A few bytes of a Parquet file can stand for gigabytes: every row may mean the same entry of a
dictionary. So the dictionaries of a row group are looked at before its rows are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_BYTES = 32 << 20
"""Of a slice, unless one row alone is larger."""
MOST_DECODED_BYTES = 64 << 20
"""Of the rows that are decoded at once by way of a dictionary, unless one alone is larger."""
_MOST_STORED_BYTES = 512 << 20  # of a column chunk that is decoded in large steps
_FEWEST_ROWS = 16


class OpenFile(NamedTuple):
    """A file that is being read, also with its texts as dictionaries; `types`: of its columns."""

    parquet: pq.ParquetFile
    dictionaries: pq.ParquetFile
    types: dict[str, pa.DataType]


def text_leaves(schema: pq.ParquetSchema) -> list[str]:
    """Paths of the columns, also within others, that can be read as dictionaries."""
    columns = map(schema.column, range(len(schema)))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def rows_at_a_time(
    opened: OpenFile, group: int, names: Sequence[str], leaves: Sequence[int], most: int
) -> int:
    """Up to `most` rows, as many of this row group as cannot decode to too much.

    `leaves` are the column chunks of the
    columns `names`. Raises ArrowException, OSError.
    """
    file, dictionaries = opened.parquet, opened.dictionaries
    described = file.metadata.row_group(group)
    if described.num_rows <= _FEWEST_ROWS:
        return _FEWEST_ROWS  # of many such groups together
    # The first row comes with the whole dictionary. It must be read before the footer is asked for
    # a chunk: pyarrow ends the process where the footer lacks one that it counts.
    try:
        first = next(dictionaries.iter_batches(1, [group], names, use_threads=False), None)
    except OSError:  # Arrow makes no dictionary of delta encodings (seen in 26.0)
        first = next(file.iter_batches(1, [group], names, use_threads=False), None)
    width = 0 if first is None else max(map(_largest_value, first.columns), default=0)
    chunks = [described.column(leaf) for leaf in leaves]
    stored = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    if any("DELTA_BYTE_ARRAY" in chunk.encodings for chunk in chunks):
        width = max(width, stored)  # a value begins as the one before
    values = max((chunk.num_values for chunk in chunks), default=0)
    rows = _FEWEST_ROWS if stored > _MOST_STORED_BYTES else most
    if width * values > MOST_DECODED_BYTES:
        per_row = max(1, -(-values // max(1, described.num_rows)))  # on average
        rows = min(rows, MOST_DECODED_BYTES // (width * per_row))
    return max(1, rows)


def _largest_value(array: pa.Array) -> int:
    """Bytes of the largest value that there could be, in this row or in another one."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        words = array.dictionary
        if pa.types.is_dictionary(words.type) or not _has_length(words.type):
            return 0
        return int(pc.max(pc.binary_length(words)).as_py() or 0)
    if pa.types.is_fixed_size_binary(kind):
        return int(kind.byte_width)
    if isinstance(array, pa.ExtensionArray):
        return _largest_value(array.storage)
    if pa.types.is_map(kind):
        return max(_largest_value(array.keys), _largest_value(array.items))
    if pa.types.is_struct(kind):
        return max(map(_largest_value, array.flatten()), default=0)
    return _largest_value(array.values) if hasattr(array, "values") else 0


def _has_length(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def regroup(tables: Iterable[pa.Table], most_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `most_rows`, the last of fewer; of fewer, too, where they would
    have more than BATCH_BYTES."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        for piece in _cut(table):
            while piece.num_rows:
                taken = piece.slice(0, most_rows - rows)
                if waiting and size + taken.nbytes > BATCH_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting, rows, size = [], 0, 0
                    continue
                waiting.append(taken)
                rows, size = rows + taken.num_rows, size + taken.nbytes
                piece = piece.slice(taken.num_rows)
                if rows == most_rows:
                    yield pa.concat_tables(waiting)
                    waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    if table.num_rows < 2 or table.nbytes <= BATCH_BYTES:
        yield table
        return
    half = table.num_rows // 2
    yield from _cut(table.slice(0, half))
    yield from _cut(table.slice(half))
