"""Which input column plays which part, and of which type it must be. Knows nothing about rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.cells import TURN_FIELDS
from pipeline.inputs.request_fields import AMBIGUOUS, OBEYED, REFUSED
from pipeline.settings import ReadSettings
from pipeline.storage.plain_types import is_text

REFUSED_COLUMN = "coppice_refused"
"""In a copy of JSON lines: why the row cannot run, null where it can. Never in the output."""
_OPTIONAL = ("max_new_tokens", "sampling_params", "tenant", REFUSED_COLUMN)
_MOST_NAMES = 20  # column names listed in a message


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Names of the columns that steer the job; None where the file has none.

    Exactly one of `prompt`, `messages` and `template` is set; the last are the columns that a
    template asks for. `fields` are those that each row is asked by, as by fields of a request;
    `unused` are named like such a field, but are of another type or of a name for many things.
    `turn_fields`: what messages say besides, in types that no template is given.
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

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that planning needs, each once."""
        chosen = (
            self.prompt, self.messages, self.id,
            self.sampling_params, self.tenant, *self.template, *self.fields,
            self.refused,
        )  # fmt: skip
        return tuple(dict.fromkeys(name for name in chosen if name is not None))

    def describe(self) -> list[str]:
        """Sentences on the columns whose part a person might not expect."""
        obeyed = [name for name in self.fields if name in OBEYED and name != "max_new_tokens"]
        said = {
            "each row's own settings are in the columns": obeyed,
            "not used, though named like settings of a request: the columns": self.unused,
            "not used, since no chat template takes them: the fields of messages": self.turn_fields,
        }
        return [f"{what} {', '.join(names)}" for what, names in said.items() if names]


def find_columns(
    schema: pa.Schema, settings: ReadSettings, name: str, template: tuple[str, ...] | None = None
) -> ColumnMap:
    """Find the columns of a plain `schema`; `name` is the file that an error should blame.

    `template`: the columns that a template makes the prompt of, None where there is no template.

    Raises InputError where a column is missing, twice there, or of the wrong type.
    """
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise InputError(f"{name} has the column {twice[0]!r} twice; rename one of the two")
    prompt, messages = None, None
    if template is None:
        prompt, messages = _find_content(schema, settings, name)
    columns = ColumnMap(
        prompt=prompt,
        messages=messages,
        id=_find(schema, settings.id_column, ("id", "custom_id"), "--id-column", name),
        sampling_params=_find(schema, None, ("sampling_params",), "", name),
        tenant=_find(schema, None, ("tenant",), "", name),
        template=template or (),
        refused=_find(schema, None, (REFUSED_COLUMN,), "", name),
    )
    _check_types(schema, columns, name)
    taken = {*columns.names} - {"max_new_tokens"}  # which counts even where a template prints it
    asked = [f for f in schema if f.name not in taken and not pa.types.is_null(f.type)]
    fields = tuple(field.name for field in asked if _is_request_field(field))
    others = (field.name for field in asked if field.name not in fields)
    unused = tuple(name for name in others if name in OBEYED.keys() | AMBIGUOUS)
    turn_fields = _turn_fields(schema, columns.messages)
    return replace(columns, fields=fields, unused=unused, turn_fields=turn_fields)


def _is_request_field(field: pa.Field) -> bool:
    """Whether a column says what a field of a request would, by its name and type."""
    kind = field.type
    match OBEYED.get(field.name):
        case None:
            return field.name in REFUSED - AMBIGUOUS
        case "stop":
            return is_text(kind) or (pa.types.is_large_list(kind) and is_text(kind.value_type))
        case "ignore_eos":
            return bool(pa.types.is_boolean(kind))
    return _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _turn_fields(schema: pa.Schema, messages: str | None) -> tuple[str, ...]:
    """Fields of the structs of a column of conversations that are not text."""
    kind = None if messages is None else schema.field(messages).type
    if kind is None or not pa.types.is_large_list(kind):
        return ()
    further = (field for field in kind.value_type if field.name not in TURN_FIELDS)
    return tuple(f.name for f in further if not (is_text(f.type) or pa.types.is_null(f.type)))


def _find_content(
    schema: pa.Schema, settings: ReadSettings, name: str
) -> tuple[str | None, str | None]:
    if settings.prompt_column and settings.messages_column:
        raise InputError("--prompt-column and --messages-column exclude each other; drop one")
    if settings.messages_column:
        return None, _find(schema, settings.messages_column, (), "--messages-column", name)
    prompt = _find(schema, settings.prompt_column, ("prompt",), "--prompt-column", name)
    if prompt is not None:
        return prompt, None
    messages = _find(schema, None, ("messages",), "", name)
    if messages is None:
        raise InputError(
            f"{name} has neither a column 'prompt' nor 'messages' (it has {_listed(schema)}); "
            "name yours with --prompt-column or --messages-column"
        )
    return None, messages


def _find(
    schema: pa.Schema, asked: str | None, usual: tuple[str, ...], flag: str, name: str
) -> str | None:
    if asked is None:
        return next((column for column in usual if column in schema.names), None)
    if asked not in schema.names:
        raise InputError(
            f"{name} has no column {asked!r} (it has {_listed(schema)}); correct {flag}"
        )
    return asked


def _listed(schema: pa.Schema) -> str:
    names = [repr(column) for column in schema.names[:_MOST_NAMES]]
    more = len(schema.names) - len(names)
    return (", ".join(names) or "no column at all") + (f" and {more} more" if more > 0 else "")


def _check_types(schema: pa.Schema, columns: ColumnMap, name: str) -> None:
    rules: tuple[tuple[str | None, Callable[[pa.DataType], bool], str], ...] = (
        (columns.prompt, _is_plain_text, "string (conversations belong to --messages-column)"),
        (columns.messages, _is_conversation, "list of structs with the strings role and content"),
        (columns.id, _is_scalar, "string or another scalar type"),
        (_find(schema, None, ("max_new_tokens",), "", name), _is_number, "integer"),
        (columns.refused, is_text, "string"),
        (columns.sampling_params, lambda t: pa.types.is_struct(t) or is_text(t), "struct"),
        (columns.tenant, is_text, "string"),
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


def _is_plain_text(kind: pa.DataType) -> bool:
    return is_text(kind) and not isinstance(kind, pa.JsonType)


def _is_conversation(kind: pa.DataType) -> bool:
    """Plain types only: a list of structs, or text that holds JSON."""
    if is_text(kind):
        return True
    if not pa.types.is_large_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    types = {field.name: field.type for field in kind.value_type}
    content = types.get("content", pa.null())
    is_parts = pa.types.is_large_list(content)
    return is_text(types.get("role", pa.null())) and (is_text(content) or is_parts)


def _is_scalar(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind) and not pa.types.is_null(kind)
