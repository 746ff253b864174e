"""One part file: a table on disk that says itself which rows it holds and whether it is whole.

Knows nothing about runs. The footer holds the rows and their provenance, the name holds the hash,
so that the set of done rows needs no second ledger that could disagree.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import StorageError
from pipeline.storage.durable import publish, temp_path, write_errors, write_new
from pipeline.storage.json_file import RECORD, Count
from pipeline.storage.row_slices import regroup
from pipeline.storage.schema import OUTPUT_FIELDS, SCHEMA_VERSION

PART_NAME = re.compile(r"part-([0-9]{5,18})-([0-9a-f]{12})\.parquet")
_METADATA_KEY = b"coppice"
_HASH_DIGITS = 12


@dataclass(frozen=True, eq=False)
class PartFooter:
    """What a part says about itself. `row_indices`: [rows] int64, ascending."""

    path: Path
    number: int
    row_indices: NDArray[np.int64]
    num_ok: int
    num_error: int
    provenance: dict[str, str]


def encode_parquet(table: pa.Table, metadata: dict[str, str] | None = None) -> pa.Buffer:
    """The bytes of a Parquet file: zstd, page checksums, `metadata` in the footer."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as out:
        for rows in regroup([table], max(1, table.num_rows)):  # no page of gigabytes
            out.write_table(rows)
        out.add_key_value_metadata(metadata or {})
    return sink.getvalue()


def write_part(folder: Path, number: int, table: pa.Table, provenance: dict[str, str]) -> Path:
    """Commit `table` (columns of `schema.output_schema`, at least one row) as part `number`.

    Returns the path. Raises StorageError if the disk refuses; then nothing is committed.
    """
    content = encode_parquet(table, {_METADATA_KEY.decode(): _describe(number, table, provenance)})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"part-{number:05d}-{digest[:_HASH_DIGITS]}.parquet"
    temp = temp_path(folder / f"part-{number:05d}")
    with write_errors(path):
        try:
            write_new(temp, memoryview(content))
            _check_written(temp, table, digest)
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    return path


def read_part_footer(path: Path) -> PartFooter:
    """Verify a committed part against the hash in its name and read what it says about itself.

    Raises StorageError if the part was altered or is not one of ours.
    """
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        raise StorageError(f"{path} is not a part of this run; move it out of the folder")
    try:
        digest = hash_file(path)
        if not digest.startswith(match[2]):
            raise StorageError(f"{path} was altered after it was written; {_REMEDY}")
        described = _read_description(path)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    return PartFooter(
        path=path,
        number=int(match[1]),
        row_indices=_expand_ranges(described["rows"]),
        num_ok=described["num_ok"],
        num_error=described["num_error"],
        provenance=described["provenance"],
    )


class _Description(TypedDict):
    rows: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    num_ok: Count
    num_error: Count
    provenance: dict[str, str]
    lines: NotRequired[Count]


_DESCRIPTION = TypeAdapter(with_config(RECORD)(_Description))
_REMEDY = "delete it and run the same command again: its rows will be computed anew"


def _describe(number: int, table: pa.Table, provenance: dict[str, str]) -> str:
    rows = np.unique(table.column("row_index").to_numpy())
    num_error = pc.sum(pc.equal(table.column("status"), "error")).as_py()
    described: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "part": number,
        "rows": _compress_ranges(rows),
        "num_ok": len(rows) - num_error,
        "num_error": num_error,
        "provenance": provenance,
    }
    if table.num_rows > len(rows):  # a row for each sample; one that failed has a single one
        described["lines"] = table.num_rows
    return json.dumps(described, separators=(",", ":"))


def _read_description(path: Path) -> dict[str, Any]:
    with pq.ParquetFile(path) as file:
        metadata = file.metadata.metadata or {}
        num_rows, names = file.metadata.num_rows, file.schema_arrow.names
    described: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
    if described["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {described['schema_version']}, not {SCHEMA_VERSION}")
    _DESCRIPTION.validate_python(described)
    held = sum(stop - start for start, stop in described["rows"])
    lines = described.get("lines", held)
    is_ordered = all(start < stop for start, stop in described["rows"])
    if not is_ordered or lines != num_rows or held != described["num_ok"] + described["num_error"]:
        raise ValueError(f"its footer says {lines} rows and it holds {num_rows}")
    lacking = [field.name for field in OUTPUT_FIELDS if field.name not in names]
    if lacking:
        raise ValueError(f"it has no column {lacking[0]}")
    return described


def _check_written(temp: Path, table: pa.Table, digest: str) -> None:
    """Read the file back before it gets its name: bytes, footer, and which row is which."""
    try:
        with pq.ParquetFile(temp, page_checksum_verification=True) as file:
            keys = file.read(columns=["id", "row_index"])
        is_same = hash_file(temp) == digest and keys.equals(table.select(["id", "row_index"]))
    except pa.ArrowException:
        is_same = False
    if not is_same:
        raise StorageError(
            f"{temp} reads back differently from what was written; "
            "check the disk, then run the same command again"
        )


def hash_file(path: Path) -> str:
    """sha256 of its bytes, as hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compress_ranges(rows: NDArray[np.int64]) -> list[list[int]]:
    """Ascending rows as half-open ranges: 3 4 5 9 -> [3, 6) [9, 10)."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = rows[np.concatenate([[0], breaks])]
    stops = rows[np.concatenate([breaks, [len(rows)]]) - 1] + 1
    return [list(pair) for pair in zip(starts.tolist(), stops.tolist(), strict=True)]


def _expand_ranges(ranges: list[list[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in ranges])
