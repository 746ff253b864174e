"""Which columns say what the rows of a file are scored for. Knows nothing about rows."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipeline.errors import InputError, UsageError
from pipeline.inputs.choices import Choices
from pipeline.inputs.column_types import is_texts
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.named_columns import find_column
from pipeline.inputs.question_texts import QuestionTexts
from pipeline.inputs.questions_file import read_questions
from pipeline.scoring_settings import ScoringSettings
from pipeline.storage.plain_types import is_text
from pipeline.storage.schema import OUTPUT_FIELDS, SCORE_FIELDS


def read_texts(asked: ScoringSettings, schema: pa.Schema) -> QuestionTexts | None:
    """What questions say to rows of `schema`; None: there are none. Raises UsageError."""
    if asked.questions is None:
        return None
    sheet = read_questions(asked.questions)
    if asked.question_order != "auto":
        sheet = sheet.ordered(asked.question_order)
    return QuestionTexts(sheet, schema.names)


def with_choices(
    columns: ColumnMap,
    schema: pa.Schema,
    asked: ScoringSettings,
    name: str,
    texts: QuestionTexts | None = None,
) -> ColumnMap:
    """The same columns and, where rows are scored, what they are scored for; `name`: of the file;
    `texts`: of questions. What asks for sampling plays no part then.

    Raises InputError where a column is missing or of the wrong type, or prompts are in segments;
    UsageError where an answer would have the name of another column.
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
        None if texts is None else texts.sheet,
        () if texts is None else texts.columns,
    )
    _check_type(schema, found, name)
    _check_names(schema, found, name)
    sampling = (columns.sampling_params, *columns.fields)
    unasked = tuple(column for column in sampling if column is not None)
    return replace(
        columns,
        sampling_params=None,
        fields=(),
        unused=tuple(column for column in columns.unused if column not in found.columns),
        idle_sampling=tuple(column for column in unasked if column not in found.columns),
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


def _check_names(schema: pa.Schema, found: Choices, name: str) -> None:
    if found.sheet is None:
        return
    ours = {field.name for field in (*OUTPUT_FIELDS, *SCORE_FIELDS)}
    carried = {*schema.names, *(f"input_{column}" for column in schema.names)}
    for question in found.sheet.questions:
        for column in question.columns:
            if column in ours or column in carried:
                owner = "the output" if column in ours else name
                raise UsageError(
                    f"the question {question.name!r} would write the column {column!r}, which "
                    f"{owner} has already; give it another name"
                )
