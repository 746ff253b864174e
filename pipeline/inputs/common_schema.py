"""One schema for all files of an input, where they have one. Knows no rows.

A column that is null in all rows of a file says nothing about its type, nor does a field that no
line of a JSON lines file has: there they are null. The numbers and objects of JSON lines get the
type that holds all of them, as within one file. Parquet files must agree in all else.

A CSV file says no types, and what was found in one of them need not hold for the next: where files
differ their column is text, which loses nothing.

A field of objects that is null wherever it is becomes text: Arrow casts it to a broken one.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.csv_file import CSV_ENDINGS, NUMBERS
from pipeline.inputs.parquet_input import ParquetInput
from pipeline.storage.plain_types import without_inner_nulls

_Found = list[tuple[ParquetInput, pa.DataType]]


def with_one_schema(files: Sequence[ParquetInput]) -> tuple[ParquetInput, ...]:
    """The files, of one schema but for the order of columns. Raises InputError naming two files."""
    first = files[0].schema
    if all(_same(first, file.schema) for file in files):
        types = {field.name: without_inner_nulls(field.type) for field in first}
        if all(types[field.name] == field.type for field in first):
            return tuple(files)
        return tuple(file.with_types(types) for file in files)
    found: dict[str, _Found] = {}
    for file in files:
        for field in file.schema:
            found.setdefault(field.name, []).append((file, field.type))
    types = {name: _common_type(name, files, having) for name, having in found.items()}
    nulls = {name: pa.scalar(None, kind) for name, kind in types.items()}
    return tuple(file.with_types(types).with_constants(nulls) for file in files)


def _same(one: pa.Schema, other: pa.Schema) -> bool:
    return len(one) == len(other) and {(f.name, f.type) for f in one} == {
        (f.name, f.type) for f in other
    }


def _common_type(name: str, files: Sequence[ParquetInput], having: _Found) -> pa.DataType:
    present = {id(file) for file, _ in having}
    for file in files:
        if id(file) not in present and not file.is_copy:
            raise _differ(name, having[0], (file, "absent"))
    typed = [(file, kind) for file, kind in having if not pa.types.is_null(kind)] or having[:1]
    kind = typed[0][1]
    if name not in NUMBERS and all(_says_no_types(file) for file, _ in typed):
        return kind if all(other == kind for _, other in typed) else pa.large_string()
    for index, (file, other) in enumerate(typed):
        if other == kind:
            continue
        try:
            if not all(seen.is_copy for seen, _ in typed[: index + 1]):
                raise pa.ArrowInvalid
            schemas = [pa.schema([("", one)]) for one in (kind, other)]
            kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except pa.ArrowException:
            raise _differ(name, typed[0], (file, other)) from None
    return without_inner_nulls(kind)


def _says_no_types(file: ParquetInput) -> bool:
    return file.origin.base_name.endswith(CSV_ENDINGS)


def _differ(
    name: str, one: tuple[ParquetInput, object], other: tuple[ParquetInput, object]
) -> InputError:
    return InputError(
        f"column {name!r} is {one[1]} in {one[0].origin.name} but {other[1]} in "
        f"{other[0].origin.name}; bring the files to one schema or run them one by one"
    )
