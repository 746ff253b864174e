"""The columns of the output. Knows nothing about how they are filled or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Protocol

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.questions import Question
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


CONVERSATION_FIELDS: tuple[pa.Field, ...] = (
    pa.field("conversation_id", pa.string()),
    pa.field("turn", pa.int64()),
    pa.field("history_tokens", pa.int64()),
    pa.field("kept_tokens", pa.int64()),
    pa.field("evicted_tokens", pa.int64()),
    pa.field("evictions", pa.int32()),
    pa.field("span", pa.int64()),
    pa.field("ctx_frac", pa.float64()),
    pa.field("skew", pa.int64()),
    pa.field("duplicate_positions", pa.int64()),
    pa.field("runs", pa.int32()),
    pa.field("gap_ratio", pa.float64()),
    pa.field("sink_kept", pa.bool_()),
    pa.field("mass_kept", pa.float64()),
    pa.field("key_turns", pa.int32()),
    pa.field("prefill_peak", pa.int64()),
    pa.field("degenerate", pa.bool_()),
    pa.field(
        "eviction_log",
        pa.list_(
            pa.struct([("at", pa.int64()), ("kept", pa.list_(pa.list_(pa.int64())))]),
        ),
    ),
)
"""Besides, of runs whose rows are turns of conversations; see `records.TurnState`."""


SCORE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("choice", pa.string()),
    pa.field("choice_index", pa.int32()),
    pa.field("loglikelihoods", pa.list_(pa.float64())),
    pa.field("probabilities", pa.list_(pa.float64())),
    pa.field("token_counts", pa.list_(pa.int32())),
    pa.field("byte_counts", pa.list_(pa.int32())),
    pa.field("greedy", pa.list_(pa.bool_())),
    pa.field("label_mass", pa.float64()),
    pa.field("perplexity", pa.float64()),
    pa.field("cut_tokens", pa.int32()),
)
"""Besides, of runs whose rows are scored."""


GUIDED_FIELDS: tuple[pa.Field, ...] = (pa.field("forced_tokens", pa.int32()),)
"""Besides, of runs in which some rows say what their answers must be; where these are JSON, also
`parsed`, of a type of its own."""
_TOKEN = pa.struct([("token", pa.string()), ("token_id", pa.int32()), ("logprob", pa.float64())])
LOGPROBS = pa.list_(pa.struct([*_TOKEN, pa.field("top", pa.list_(_TOKEN))]))
"""Of each token of an answer, and of the likeliest ones in its place."""
LOGPROB_FIELDS: tuple[pa.Field, ...] = (pa.field("logprobs", LOGPROBS),)
"""Besides, of runs where rows ask for log-probabilities."""
EXPLODED_FIELDS: tuple[pa.Field, ...] = (pa.field("sample_index", pa.int32(), nullable=False),)
"""Besides, where each sample is a row."""


REASONING_FIELDS: tuple[pa.Field, ...] = (
    pa.field("reasoning", pa.string()),
    pa.field("reasoning_tokens", pa.int32()),
)
"""Besides, of runs whose model thinks before it answers."""


def sample_type(with_logprobs: bool, with_reasoning: bool) -> pa.ListType:
    """Of the column `samples`."""
    fields = [
        pa.field("generated_text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("completion_token_ids", pa.list_(pa.int32())),
        *(LOGPROB_FIELDS if with_logprobs else ()),
        *(REASONING_FIELDS if with_reasoning else ()),
    ]
    return pa.list_(pa.struct(fields))


SAMPLE_FIELDS: tuple[pa.Field, ...] = (pa.field("samples", sample_type(False, False)),)
"""Besides, where rows have several samples."""


TOOL_FIELDS: tuple[pa.Field, ...] = (
    pa.field(
        "tool_calls", pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
    ),
)
"""Besides, of runs whose rows may have tools; null of rows without."""


class Parts(Protocol):
    """The input columns that play a part in what is written; None: there is none."""

    @property
    def id(self) -> str | None: ...

    @property
    def conversation(self) -> str | None: ...

    @property
    def turn(self) -> str | None: ...

    @property
    def has_segments(self) -> bool:
        """Whether prompts are in segments."""

    @property
    def has_scores(self) -> bool:
        """Whether rows are scored."""

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked of each row."""

    @property
    def is_guided(self) -> bool:
        """Whether some rows say what their answers must be."""

    @property
    def parsed(self) -> pa.DataType | None:
        """The type of answers that are JSON; None: there are none."""

    @property
    def has_logprobs(self) -> bool:
        """Whether some row asks for log-probabilities."""

    @property
    def has_samples(self) -> bool:
        """Whether some row has several samples, which are one row of the output."""

    @property
    def is_exploded(self) -> bool:
        """Whether each sample is a row of the output."""

    @property
    def reasoning(self) -> bool:
        """Whether answers are told from what was thought before them."""

    @property
    def tool_calls(self) -> bool:
        """Whether answers may call tools."""


def result_fields(parts: Parts) -> tuple[pa.Field, ...]:
    """Our columns."""
    documents = DOCUMENT_FIELDS if parts.has_segments else ()
    turns = CONVERSATION_FIELDS if parts.conversation is not None else ()
    scores = SCORE_FIELDS if parts.has_scores else ()
    guided = GUIDED_FIELDS if parts.is_guided else ()
    parsed = () if parts.parsed is None else (pa.field("parsed", parts.parsed),)
    questions = question_fields(parts.questions)
    answers = (*guided, *parsed, *_answer_fields(parts))
    reasoning = REASONING_FIELDS if parts.reasoning else ()
    calls = TOOL_FIELDS if parts.tool_calls else ()
    said = (*reasoning, *calls, *answers)
    return (*OUTPUT_FIELDS, *documents, *turns, *scores, *said, *questions)


def question_fields(questions: Sequence[Question]) -> tuple[pa.Field, ...]:
    """What is written of questions: the answer of each, then what is known of it."""
    answers = {"choice": pa.string(), "scale": pa.float64(), "boolean": pa.bool_()}
    return tuple(
        pa.field(name, pa.float64() if place else answers[question.kind])
        for question in questions
        for place, name in enumerate(question.columns)
    )


def _answer_fields(parts: Parts) -> tuple[pa.Field, ...]:
    logprobs = LOGPROB_FIELDS if parts.has_logprobs else ()
    if parts.is_exploded:
        return (*logprobs, *EXPLODED_FIELDS)
    if not parts.has_samples:
        return logprobs
    samples = pa.field("samples", sample_type(parts.has_logprobs, parts.reasoning))
    return (*logprobs, samples)


_FURTHER = (
    DOCUMENT_FIELDS,
    CONVERSATION_FIELDS,
    SCORE_FIELDS,
    REASONING_FIELDS,
    TOOL_FIELDS,
    GUIDED_FIELDS,
    LOGPROB_FIELDS,
    EXPLODED_FIELDS,
    SAMPLE_FIELDS,
)


def fields_among(names: Collection[str]) -> tuple[pa.Field, ...]:
    """Our columns of a run whose output has these."""
    further = (fields for fields in _FURTHER if {field.name for field in fields} <= set(names))
    return (*OUTPUT_FIELDS, *chain.from_iterable(further))


def output_schema(input_schema: pa.Schema, parts: Parts) -> pa.Schema:
    """Our columns, then every input column. One that is ours already, name and type, is there
    once; others with a name of ours are called `input_<name>`.

    Raises InputError where two input columns would end up with one name.
    """
    ours = result_fields(parts)
    taken = {field.name for field in ours}
    carried = [
        pa.field(
            f"input_{field.name}" if field.name in taken else field.name, carried_type(field.type)
        )
        for field in input_schema
        if not _is_ours(field, parts)
    ]
    twice = [name for name, count in Counter(f.name for f in carried).items() if count > 1]
    if twice:
        bare = twice[0].removeprefix("input_")
        raise InputError(
            f"the input columns {bare!r} and {twice[0]!r} would both be written as "
            f"{twice[0]!r}; rename one of the two"
        )
    return pa.schema([*ours, *carried])


def carry_columns(results: pa.Table, inputs: pa.Table, parts: Parts) -> pa.Table:
    """Put the input columns of the same rows, in the same order, beside our result columns.

    `results` has the names of `result_fields`; it is cast to their types.
    """
    schema = output_schema(inputs.schema, parts)
    fields = result_fields(parts)
    ours = results.select([field.name for field in fields])
    theirs = [
        inputs.column(index).cast(carried_type(field.type))
        for index, field in enumerate(inputs.schema)
        if not _is_ours(field, parts)
    ]
    return pa.Table.from_arrays([*ours.cast(pa.schema(fields)).columns, *theirs], schema=schema)


def _is_ours(field: pa.Field, parts: Parts) -> bool:
    if field.name == "turn":
        return parts.turn == "turn" and bool(pa.types.is_integer(field.type))
    made_of = {"id": parts.id, "conversation_id": parts.conversation}
    return made_of.get(field.name) == field.name and is_text(field.type)
