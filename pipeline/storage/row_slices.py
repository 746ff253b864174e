"""How many rows of a row group may be decoded at once, and tables in slices of bounded size.

A few bytes of a Parquet file can stand for gigabytes: every row may mean the same entry of a
dictionary. So of each column chunk it is known, before it is read, what a row may take at most.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_BYTES = 32 << 20
"""Of a slice, unless one row alone is larger."""
MOST_DECODED_BYTES = 256 << 20
"""Of what is decoded at once, unless one row alone, or one page as it is stored, is larger."""
_FEWEST_ROWS = 16  # where only a page's own bytes are the bound
_DICTIONARY_PAGE = 2
_HEADER_BYTES = 32


def rows_at_a_time(
    source: BinaryIO, metadata: pq.FileMetaData, group: int, leaves: list[int], most: int
) -> int:
    """Up to `most` rows, as many of this row group as cannot decode to too much.

    `leaves` are the column chunks that are read, of which Arrow must have read a row before: it
    ends the process where one is asked for that the footer only announces. `source` is the file.
    Raises OSError.
    """
    described = metadata.row_group(group)
    num_rows = max(1, described.num_rows)
    rows = most
    for leaf in leaves:
        chunk = described.column(leaf)
        width = 0
        if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":
            width = metadata.schema.column(leaf).length
        elif chunk.physical_type == "BYTE_ARRAY":
            width = _largest_value(source, chunk)
            if chunk.total_uncompressed_size > MOST_DECODED_BYTES:
                rows = min(rows, _FEWEST_ROWS)
        if width * chunk.num_values > MOST_DECODED_BYTES:
            values = max(1, -(-chunk.num_values // num_rows))  # of a row, on average
            rows = min(rows, MOST_DECODED_BYTES // (width * values))
    return max(1, rows)


def _largest_value(source: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes that a value can have though the chunk stores fewer for it; 0: each is stored whole.

    Whether there is a dictionary is asked of the first page, as Arrow does, and not of the footer.
    """
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return int(chunk.total_uncompressed_size)  # a value begins as the one before
    starts = [chunk.dictionary_page_offset, chunk.data_page_offset]
    source.seek(min(start for start in starts if start))
    kind, size = _read_header(source.read(_HEADER_BYTES))
    return size if kind == _DICTIONARY_PAGE else 0


def _read_header(header: bytes) -> tuple[int, int]:
    """Type and uncompressed bytes of a page: the first fields in Thrift's compact protocol.

    ```
     0x15 type   0x15 uncompressed size   0x15 compressed size ...      each a zigzag varint
    ```
    Raises OSError if it is none.
    """
    stream = io.BytesIO(header)
    found = []
    for _ in range(2):
        if stream.read(1) != b"\x15":
            raise OSError("a page has no header")
        value, shift = 0, 0
        while byte := stream.read(1):
            value |= (byte[0] & 0x7F) << shift
            shift += 7
            if byte[0] < 0x80:
                break
        found.append(value >> 1)
    return found[0], found[1]


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
