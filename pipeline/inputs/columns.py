"""Which input column plays which part, and of which type it must be. Knows nothing about rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.cells import TURN_FIELDS
from pipeline.inputs.choices import Choices
from pipeline.inputs.column_types import (
    is_conversation,
    is_json,
    is_number,
    is_plain_text,
    is_request_field,
    is_scalar,
    is_segments,
    is_texts,
)
from pipeline.inputs.content_columns import find_content
from pipeline.inputs.named_columns import find_column
from pipeline.inputs.request_fields import AMBIGUOUS, OBEYED
from pipeline.prompt_settings import ReadSettings
from pipeline.questions import Question
from pipeline.storage.plain_types import is_text

REFUSED_COLUMN = "coppice_refused"
"""In a copy of JSON lines: why the row cannot run, null where it can. Never in the output."""
_OPTIONAL = ("max_new_tokens", "sampling_params", "tenant", REFUSED_COLUMN)


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Names of the columns that steer the job; None where the file has none.

    Exactly one of `prompt`, `messages`, `segments` and `template` is set; the last are the columns
    that a template asks for. `documents` stand before the `prompt`. `fields` are those that each
    row is asked by, as by fields of a request; `unused` are named like such a field, but are of
    another type or of a name for many things. `turn_fields`: what messages say besides, in types
    that no template is given. `unasked`: documents or segments that are no part of the prompt.
    Rows are turns where `conversation` and `turn` are set; `idle_turns`: columns that look like
    these, and nobody asks for. `scored`: where nothing is generated; `idle_sampling`: columns that
    would steer what is. `json_schema`: what the answer of each row must be. `names_tools`: whether
    rows may have tools. The last seven say what the output has besides, see `schema.Parts`; nobody
    knows most of it before the rows are read.
    """

    prompt: str | None
    messages: str | None
    id: str | None
    sampling_params: str | None
    tenant: str | None
    template: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    turn_fields: tuple[str, ...] = ()
    refused: str | None = None
    json_schema: str | None = None
    segments: str | None = None
    documents: str | None = None
    unasked: tuple[str, ...] = ()
    conversation: str | None = None
    turn: str | None = None
    idle_turns: tuple[str, ...] = ()
    scored: Choices | None = None
    idle_sampling: tuple[str, ...] = ()
    names_tools: bool = False
    reasoning: bool = False
    tool_calls: bool = False
    is_guided: bool = False
    parsed: pa.DataType | None = None
    has_logprobs: bool = False
    has_samples: bool = False
    is_exploded: bool = False

    @property
    def has_scores(self) -> bool:
        """Whether continuations are scored, and nothing is generated."""
        return self.scored is not None

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked of each row; nothing where other things are scored."""
        sheet = None if self.scored is None else self.scored.sheet
        return () if sheet is None else sheet.questions

    @property
    def has_segments(self) -> bool:
        """Whether each prompt is known by its preamble, documents and question."""
        return self.segments is not None or self.documents is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that planning needs, each once."""
        chosen = (
            self.prompt, self.messages, self.id,
            self.sampling_params, self.tenant, *self.template, *self.fields, self.json_schema,
            self.refused, self.segments, self.documents, self.conversation, self.turn,
            *(() if self.scored is None else self.scored.columns),
        )  # fmt: skip
        return tuple(dict.fromkeys(name for name in chosen if name is not None))

    def describe(self) -> list[str]:
        """Sentences on the columns whose part a person might not expect."""
        whole = () if self.conversation is None or self.messages is None else (self.messages,)
        obeyed = [name for name in self.fields if name in OBEYED and name != "max_new_tokens"]
        own = {"each row's own settings are in the columns": obeyed}
        added = {
            "new messages alone, behind all that was said before (a file of whole histories needs "
            "no --conversation-column): the column": whole,
        }
        return [*_sentences(own), *self.unheeded(), *_sentences(added)]

    def unheeded(self) -> list[str]:
        """Those of them that say what is not done, though a person may have meant it."""
        said = {
            "not used, though named like settings of a request: the columns": self.unused,
            "not used, since no chat template takes them: the fields of messages": self.turn_fields,
            "no part of the prompt unless --reuse asks for documents: the columns": self.unasked,
            "each row is a prompt by itself, and no turn that follows others, unless "
            "--conversation-column asks for the columns": self.idle_turns,
            "not used, since nothing is generated: the columns": self.idle_sampling,
        }
        return _sentences(said)


def _sentences(said: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{what} {', '.join(names)}" for what, names in said.items() if names]


def find_columns(
    schema: pa.Schema,
    settings: ReadSettings,
    name: str,
    template: tuple[str, ...] | None = None,
    wants_segments: bool = False,
) -> ColumnMap:
    """Find the columns of a plain `schema`; `name` is the file that an error should blame.

    `template`: the columns that a template makes the prompt of, None where there is no template.
    `wants_segments`: prompts in segments are needed, and found by their usual names.

    Raises InputError where a column is missing, twice there, or of the wrong type.
    """
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise InputError(f"{name} has the column {twice[0]!r} twice; rename one of the two")
    content: dict[str, str] = {}
    if template is None:
        content = find_content(schema, settings, name, wants_segments)
    columns = ColumnMap(
        prompt=content.get("prompt"),
        messages=content.get("messages"),
        segments=content.get("segments"),
        documents=content.get("documents"),
        id=find_column(schema, settings.id_column, ("id", "custom_id"), "--id-column", name),
        sampling_params=find_column(schema, None, ("sampling_params",), "", name),
        tenant=find_column(schema, None, ("tenant",), "", name),
        json_schema=find_column(
            schema, settings.json_schema_column, (), "--json-schema-column", name
        ),
        template=template or (),
        refused=find_column(schema, None, (REFUSED_COLUMN,), "", name),
    )
    _check_types(schema, columns, name)
    taken = {*columns.names} - {"max_new_tokens"}  # which counts even where a template prints it
    asked = [f for f in schema if f.name not in taken and not pa.types.is_null(f.type)]
    fields = tuple(field.name for field in asked if is_request_field(field))
    unasked = tuple(
        name
        for name, fits in _IN_PARTS.items()
        if name not in columns.names and name in schema.names and fits(schema.field(name).type)
    )
    others = (field.name for field in asked if field.name not in (*fields, *unasked))
    unused = tuple(name for name in others if name in OBEYED.keys() | AMBIGUOUS)
    turn_fields = _turn_fields(schema, columns.messages)
    return replace(
        columns,
        fields=fields,
        unused=unused,
        turn_fields=turn_fields,
        unasked=unasked,
        names_tools="tools" in fields or _may_name_tools(schema, columns.sampling_params),
    )


def _may_name_tools(schema: pa.Schema, sampling_params: str | None) -> bool:
    """Whether a row's sampling parameters may: what JSON text says is known row by row."""
    if sampling_params is None:
        return False
    kind = schema.field(sampling_params).type
    return is_text(kind) or (pa.types.is_struct(kind) and kind.get_field_index("tools") >= 0)


def _turn_fields(schema: pa.Schema, messages: str | None) -> tuple[str, ...]:
    """Fields of the structs of a column of conversations that are not text."""
    kind = None if messages is None else schema.field(messages).type
    if kind is None or not pa.types.is_large_list(kind):
        return ()
    further = (field for field in kind.value_type if field.name not in TURN_FIELDS)
    return tuple(f.name for f in further if not (is_text(f.type) or pa.types.is_null(f.type)))


def _check_types(schema: pa.Schema, columns: ColumnMap, name: str) -> None:
    rules: tuple[tuple[str | None, Callable[[pa.DataType], bool], str], ...] = (
        (columns.prompt, is_plain_text, "string (conversations belong to --messages-column)"),
        (columns.messages, is_conversation, "list of structs with the strings role and content"),
        (columns.segments, is_segments, "list of structs with the strings role and text"),
        (columns.documents, is_texts, "list of strings"),
        (columns.id, is_scalar, "string or another scalar type"),
        (find_column(schema, None, ("max_new_tokens",), "", name), is_number, "integer"),
        (columns.refused, is_text, "string"),
        (columns.sampling_params, lambda t: pa.types.is_struct(t) or is_text(t), "struct"),
        (columns.tenant, is_text, "string"),
        (columns.json_schema, is_json, "string or struct"),
    )
    for column, fits, wanted in rules:
        if column is None:
            continue
        found = schema.field(column).type
        if not fits(found) and not (pa.types.is_null(found) and column in _OPTIONAL):
            raise InputError(
                f"column {column!r} of {name} has the type {found}, not {wanted}; "
                "convert or rename it"
            )


_IN_PARTS = {"segments": is_segments, "documents": is_texts}
"""Columns that may be parts of a prompt, by their usual names."""
