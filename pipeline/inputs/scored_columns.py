"""Which columns say what the rows of a file are scored for. Knows nothing about rows."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.choices import Choices
from pipeline.inputs.columns import ColumnMap, find_column, is_texts
from pipeline.scoring_settings import ScoringSettings
from pipeline.storage.plain_types import is_text


def with_choices(
    columns: ColumnMap, schema: pa.Schema, asked: ScoringSettings, name: str
) -> ColumnMap:
    """The same columns and, where rows are scored, what they are scored for; `name`: of the file.
    What asks for sampling plays no part then.

    Raises InputError where a column is missing or of the wrong type, or prompts are in segments.
    """
    if not asked.scores:
        return columns
    if columns.has_segments:
        raise InputError(
            f"prompts of {name} are in segments, whose continuations are not scored; name a column "
            "with --prompt-column or --messages-column"
        )
    found = Choices(
        find_column(schema, asked.choices_column, (), "--choices-column", name),
        find_column(schema, asked.continuation_column, (), "--continuation-column", name),
        asked.choices,
    )
    _check_type(schema, found, name)
    sampling = (columns.sampling_params, *columns.fields)
    unasked = tuple(column for column in sampling if column is not None)
    return replace(
        columns,
        sampling_params=None,
        fields=(),
        unused=tuple(column for column in columns.unused if column != found.column),
        idle_sampling=tuple(column for column in unasked if column != found.column),
        scored=found,
    )


def _check_type(schema: pa.Schema, found: Choices, name: str) -> None:
    if found.column is None:
        return
    kind = schema.field(found.column).type
    is_plain = is_text(kind) and not isinstance(kind, pa.JsonType)
    fits = is_plain if found.continuation else is_text(kind) or is_texts(kind)
    if not fits and not pa.types.is_null(kind):
        wanted = "string" if found.continuation else "list of strings"
        raise InputError(
            f"column {found.column!r} of {name} has the type {kind}, not {wanted}; convert it or "
            "name another one"
        )
