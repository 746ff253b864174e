"""Whether the output can carry an input's columns: written and read back before anything runs.

A type that the writer or polars, which counts what a run has written, cannot take would else be
found out when all rows are answered, and again at each resume.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import polars as pl
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage.part_file import encode_parquet
from pipeline.storage.schema import Parts, carry_columns, output_schema, result_fields
from pipeline.unheard import panics_unheard


def check_carriage(inputs: pa.Table, parts: Parts, name: str) -> None:
    """Raises InputError naming the first column of `inputs` that does not come back.

    Also where two columns would be written under one name. One column of each type is tried.
    `name`: the file to blame.
    """
    output_schema(inputs.schema, parts)
    for field in inputs.schema:
        if any("\0" in inner for inner in _names(field)):
            raise InputError(
                f"the column {field.name!r} of {name} has a name with a NUL character in it, which "
                "the output cannot carry; rename it"
            )
    first_of = {field.type: field for field in reversed(list(inputs.schema))}
    some = inputs.select([field.name for field in first_of.values()])
    if _comes_back(some, parts):
        return
    for field in reversed(first_of.values()):
        if not _comes_back(inputs.select([field.name]), parts):
            raise InputError(
                f"column {field.name!r} of {name} has the type {field.type}, which the output "
                "cannot carry; cast or drop it"
            )
    raise InputError(f"the columns of {name} cannot be carried together; drop those that are odd")


def check_types_carried(schema: pa.Schema, parts: Parts, name: str) -> None:
    """`check_carriage` of no row, and of one that is null."""
    check_carriage(schema.empty_table(), parts, name)
    nulls = [pa.nulls(1, field.type) for field in schema]
    table = pa.Table.from_arrays(nulls, schema=schema)
    check_carriage(table, parts, name)


def _comes_back(inputs: pa.Table, parts: Parts) -> bool:
    """Through the writer and the reader of parts, and as failed rows once more."""
    row = {"id": "", "row_index": 0, "status": "error"}
    ours = pa.schema(result_fields(parts))
    results = pa.Table.from_pylist([row] * inputs.num_rows, schema=ours)
    try:
        table = carry_columns(results, inputs, parts)
        part = encode_parquet(table)
        with panics_unheard():
            rows = pl.scan_parquet(io.BytesIO(part))
            failed = rows.filter(pl.col("status") == "error").sort("row_index").collect()
            encode_parquet(failed.to_arrow())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of Rust is no Exception
        return False
    return bool(failed.height == inputs.num_rows)


def _names(field: pa.Field) -> Iterator[str]:
    """Of a column and of all fields within it."""
    yield field.name
    for index in range(field.type.num_fields):
        yield from _names(field.type.field(index))
