"""The columns of the output. Knows nothing about how they are filled or written."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage.plain_types import carried_type, is_text

SCHEMA_VERSION = 2

OUTPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("row_index", pa.int64(), nullable=False),
    pa.field("generated_text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("cached_tokens", pa.int32()),
    pa.field("reuse_depth", pa.int32()),
    pa.field("reuse_source", pa.string()),
    pa.field("group_id", pa.int64()),
    pa.field("dedup_of", pa.string()),
    pa.field("queue_s", pa.float64()),
    pa.field("prefill_s", pa.float64()),
    pa.field("prefill_amortized_s", pa.float64()),
    pa.field("decode_s", pa.float64()),
    pa.field("ttft_s", pa.float64()),
    pa.field("latency_s", pa.float64()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int8()),
    pa.field("completion_token_ids", pa.list_(pa.int32())),
)
DOCUMENT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("reuse_mode", pa.string()),
    pa.field("exact", pa.bool_()),
    pa.field("documents", pa.int32()),
    pa.field("document_tokens", pa.int32()),
    pa.field("repaired_tokens", pa.int32()),
    pa.field("link_tokens", pa.int32()),
    pa.field("fallback_reason", pa.string()),
)
"""Besides, of runs whose prompts are in segments."""


def result_fields(has_segments: bool) -> tuple[pa.Field, ...]:
    """Our columns."""
    return (*OUTPUT_FIELDS, *DOCUMENT_FIELDS) if has_segments else OUTPUT_FIELDS


def output_schema(
    input_schema: pa.Schema, id_column: str | None, has_segments: bool = False
) -> pa.Schema:
    """Our columns, then every input column; an id column of text named `id` is ours already, and
    others with a name of ours are called `input_<name>`.

    Raises InputError where two input columns would end up with one name.
    """
    ours = result_fields(has_segments)
    taken = {field.name for field in ours}
    carried = [
        pa.field(
            f"input_{field.name}" if field.name in taken else field.name, carried_type(field.type)
        )
        for field in input_schema
        if not _is_ours(field, id_column)
    ]
    twice = [name for name, count in Counter(f.name for f in carried).items() if count > 1]
    if twice:
        bare = twice[0].removeprefix("input_")
        raise InputError(
            f"the input columns {bare!r} and {twice[0]!r} would both be written as "
            f"{twice[0]!r}; rename one of the two"
        )
    return pa.schema([*ours, *carried])


def carry_columns(results: pa.Table, inputs: pa.Table, id_column: str | None) -> pa.Table:
    """Put the input columns of the same rows, in the same order, beside our result columns.

    `results` has the names of `result_fields`, with those of documents or without; it is cast to
    their types.
    """
    has_segments = DOCUMENT_FIELDS[0].name in results.column_names
    schema = output_schema(inputs.schema, id_column, has_segments)
    fields = result_fields(has_segments)
    ours = results.select([field.name for field in fields])
    theirs = [
        inputs.column(index).cast(carried_type(field.type))
        for index, field in enumerate(inputs.schema)
        if not _is_ours(field, id_column)
    ]
    return pa.Table.from_arrays([*ours.cast(pa.schema(fields)).columns, *theirs], schema=schema)


def _is_ours(field: pa.Field, id_column: str | None) -> bool:
    return bool(field.name == "id" == id_column and is_text(field.type))
