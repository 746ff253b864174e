"""JSON lines and JSON lists as tables of a batch each. What a request means is `openai_batch`'s.

```
 lines ─► types of all lines, merged (plain objects only) ─► lines again ─► tables of a batch
```

Plain objects are read twice, since the last line may widen the type of the first. What is no JSON
object is refused by its line's number. A line that says what no row can say is refused too, or kept
as a row with the reason in `REFUSED_COLUMN`: one row shall not stop a job. None is quoted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from pipeline.constraints import REQUEST_FIELDS
from pipeline.errors import InputError
from pipeline.inputs.columns import REFUSED_COLUMN
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.line_reader import check_fields, read_batches, read_lines
from pipeline.inputs.openai_batch import TEXT_URL, BadRequest, is_request, row_of_request
from pipeline.inputs.refused_lines import (
    MISFITS,
    Line,
    is_text_value,
    place_of,
    with_json_text,
    without_fields,
    without_misfits,
)

_DEEPEST = 30  # lists in lists; each is three levels of a Parquet schema
_TEXT = "prompt"
_WITH_SCHEMAS = (*REQUEST_FIELDS, "sampling_params", "tools")
_WORDS_OF_SCHEMAS = {"properties", "$ref", "$defs", "anyOf", "oneOf", "allOf", "enum", "const"}
_REQUEST_SCHEMA = pa.schema(
    {
        "custom_id": pa.large_string(),
        "prompt": pa.large_string(),
        "messages": pa.large_string(),
        "max_new_tokens": pa.int64(),
        "sampling_params": pa.large_string(),
        "model": pa.large_string(),
        REFUSED_COLUMN: pa.large_string(),
    }
)


Tables = tuple[pa.Schema, Iterator[pa.Table]]
"""The schema of a file, and its rows in batches."""
_MakeTable = Callable[[list[Line]], pa.Table]


def read_json(source: InputFile, keeps_refused: bool) -> Tables:
    """A row for each line or item of `source`; `keeps_refused`: whether those that no row can say
    are rows with a reason. Raises InputError naming line or field."""
    first = next(read_lines(source), None)
    if first is None:
        raise InputError(f"{source.name} holds no line; check how it was written")
    read = _requests if is_request(first[1]) else _plain
    schema, make_table = read(source, first[1], keeps_refused)
    batches = read_batches(source, _count_fields(pa.struct(list(schema))))
    return schema, map(make_table, batches)


def _requests(
    source: InputFile, first: dict[str, Any], keeps_refused: bool
) -> tuple[pa.Schema, _MakeTable]:
    """All lines must be of the first one's kind, chat or text."""
    content, other = "messages", "prompt"
    if first.get("url") == TEXT_URL:
        content, other = other, content
    left_out = {other} if keeps_refused else {other, REFUSED_COLUMN}
    schema = pa.schema([field for field in _REQUEST_SCHEMA if field.name not in left_out])

    def make_row(number: int, line: dict[str, Any]) -> dict[str, Any]:
        try:
            return _row(source, number, line, content)
        except InputError as error:
            if not keeps_refused:
                raise
            name = line.get("custom_id")
            is_name = isinstance(name, str) and is_text_value(name)
            return {"custom_id": name if is_name else None, REFUSED_COLUMN: str(error)}

    def make_table(batch: list[Line]) -> pa.Table:
        return pa.Table.from_pylist([make_row(*line) for line in batch], schema)

    return schema, make_table


def _row(source: InputFile, number: int, line: dict[str, Any], content: str) -> dict[str, Any]:
    try:
        row = row_of_request(line)
    except BadRequest as error:
        raise InputError(f"{place_of(source.name, number)}: {error}") from None
    if content not in row:
        raise InputError(
            f"{place_of(source.name, number)} is of another kind than the first; "
            "put chat and text completions into two files"
        )
    return row


def _plain(
    source: InputFile, _: dict[str, Any], keeps_refused: bool
) -> tuple[pa.Schema, _MakeTable]:
    """Objects of any fields; a field that a line lacks is null there.

    A field that Parquet cannot hold is JSON text: of objects without fields, or too deep, or nested
    with values of two types, like messages whose content is text here and a list of parts there.
    """
    kind = pa.struct([])
    bad: set[int] | None = set() if keeps_refused else None
    mixed: set[str] = set()
    for batch in read_batches(source):
        kind = _widen_by(source, kind, batch, bad, mixed)
        check_fields(source, _count_fields(kind), batch[-1][0])
    texts = (f.name for f in kind if _may_hold_schema(f) or not _is_storable(f.type))
    as_json = [*texts, *sorted(mixed)]
    types = {field.name: field.type for field in kind}
    types |= dict.fromkeys(as_json, pa.string())
    stored = pa.struct(types)
    kinds = {name: pa.json_() if name in as_json else types[name] for name in types}
    schema = pa.schema(kinds)

    def make_table(batch: list[Line]) -> pa.Table:
        lines = batch
        if bad and not bad.isdisjoint(number for number, _ in batch):
            lines = without_misfits(source.name, batch)
        if as_json:
            lines = with_json_text(lines, as_json)
        try:
            rows = pa.array([line for _, line in lines], stored)
        except MISFITS as error:
            raise _blame(
                source, lines, lambda name, value: pa.array([value], types[name])
            ) from error
        return pa.Table.from_struct_array(rows).cast(schema)

    return schema, make_table


def _count_fields(kind: pa.DataType) -> int:
    """Of a type and all types inside of it."""
    return 1 + sum(_count_fields(kind.field(n).type) for n in range(kind.num_fields))


def _widen_by(
    source: InputFile, kind: pa.StructType, batch: list[Line], bad: set[int] | None, mixed: set[str]
) -> pa.StructType:
    """The type that holds all lines before, which `kind` holds, and those of `batch`.

    `bad`: takes the numbers of lines that no column holds; None: these are refused. `mixed`: takes
    the nested fields that no one type holds, which the result leaves out.
    """
    batch = without_fields(batch, mixed)
    try:
        return _widen(kind, pa.array([line for _, line in batch]).type)
    except MISFITS as error:
        found = _nested_of_two_types(kind, batch)
        if found:
            mixed |= found
            kind = pa.struct([field for field in kind if field.name not in found])
            return _widen_by(source, kind, batch, bad, mixed)
        if bad is not None:
            mended = without_misfits(source.name, batch)
            bad |= {number for number, line in mended if REFUSED_COLUMN in line}
            return _widen_by(source, kind, mended, None, mixed)
        types = {field.name: field.type for field in kind}

        def widen(name: str, value: object) -> None:
            types[name] = _widen(types.get(name, pa.null()), pa.array([value]).type)

        raise _blame(source, batch, widen) from error


def _nested_of_two_types(kind: pa.StructType, batch: list[Line]) -> set[str]:
    """The fields with lists or objects whose values, with those before, have no type in common.

    Values that have no type at all, like numbers of 71 bits, are their lines' fault; so is a
    prompt that is no text where others are.
    """
    types = {field.name: field.type for field in kind}
    values: dict[str, list[object]] = {}
    for _, line in batch:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    found = set()
    for name, some in values.items():
        if name == _TEXT:
            continue
        known = types.get(name, pa.null())
        if pa.types.is_nested(known) or any(isinstance(value, list | dict) for value in some):
            try:
                _widen(known, pa.array(some).type)
            except pa.ArrowException:
                found.add(name)
            except MISFITS:
                continue
    return found


def _widen(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Null gives way, integers become floats, objects get each other's fields; else it raises."""
    both = [pa.schema([("x", kind)]) for kind in (one, other)]
    return pa.unify_schemas(both, promote_options="permissive").field("x").type


def _blame(
    source: InputFile, batch: list[Line], take: Callable[[str, object], object]
) -> InputError:
    """The error of the first line with a field that `take` does not take."""
    for number, line in batch:
        for name, value in line.items():
            try:
                take(name, value)
            except MISFITS as error:
                return InputError(
                    f"the field {name!r} of {place_of(source.name, number)} does not fit into a "
                    f"column ({type(error).__name__}); give it one type in all lines"
                )
    return InputError(
        f"the lines of {source.name} do not fit into columns; give each field one type"
    )


def _may_hold_schema(field: pa.Field) -> bool:
    """Of a JSON schema the order of names counts, and 1 is not 1.0. A column of objects has one
    order and one type for all rows, and null where a row has no such name."""
    if not pa.types.is_nested(field.type):
        return False
    names = [field.type.field(n).name for n in range(field.type.num_fields)]
    return field.name in _WITH_SCHEMAS or not _WORDS_OF_SCHEMAS.isdisjoint(names)


def _is_storable(kind: pa.DataType, depth: int = 0) -> bool:
    """Parquet has no object without fields, and few readers take a hundred levels of schema."""
    if depth > _DEEPEST:
        return False
    inner = [kind.field(n).type for n in range(kind.num_fields)]
    is_empty = pa.types.is_struct(kind) and not inner
    return not is_empty and all(_is_storable(part, depth + 1) for part in inner)
