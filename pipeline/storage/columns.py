"""Which input column plays which part, and of which type it must be. Knows nothing about rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.settings import ReadSettings
from pipeline.storage.plain_types import can_be_carried, is_text

_MOST_NAMES = 20  # column names listed in a message


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Names of the columns that steer the job; None where the file has none.

    Exactly one of `prompt`, `messages` and `template` is set; the last are the columns that a
    template asks for.
    """

    prompt: str | None
    messages: str | None
    id: str | None
    max_new_tokens: str | None
    sampling_params: str | None
    tenant: str | None
    template: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that planning needs, each once."""
        chosen = (
            self.prompt, self.messages, self.id,
            self.max_new_tokens, self.sampling_params, self.tenant, *self.template,
        )  # fmt: skip
        return tuple(dict.fromkeys(name for name in chosen if name is not None))


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
    _check_carried(schema, name)
    prompt, messages = None, None
    if template is None:
        prompt, messages = _find_content(schema, settings, name)
    columns = ColumnMap(
        prompt=prompt,
        messages=messages,
        id=_find(schema, settings.id_column, ("id", "custom_id"), "--id-column", name),
        max_new_tokens=_find(schema, None, ("max_new_tokens",), "", name),
        sampling_params=_find(schema, None, ("sampling_params",), "", name),
        tenant=_find(schema, None, ("tenant",), "", name),
        template=template or (),
    )
    _check_types(schema, columns, name)
    return columns


def _check_carried(schema: pa.Schema, name: str) -> None:
    for field in schema:
        if not can_be_carried(field.type):
            raise InputError(
                f"column {field.name!r} of {name} has the type {field.type}, which the output "
                "cannot carry; cast or drop it"
            )


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
        (columns.prompt, is_text, "string (conversations belong to --messages-column)"),
        (columns.messages, _is_conversation, "list of structs with the strings role and content"),
        (columns.id, _is_scalar, "string or another scalar type"),
        (columns.max_new_tokens, pa.types.is_integer, "integer"),
        (columns.sampling_params, lambda t: pa.types.is_struct(t) or is_text(t), "struct"),
        (columns.tenant, is_text, "string"),
    )
    for column, fits, wanted in rules:
        if column is None:
            continue
        found = schema.field(column).type
        if not fits(found):
            raise InputError(
                f"column {column!r} of {name} has the type {found}, not {wanted}; "
                "convert or rename it"
            )


def _is_conversation(kind: pa.DataType) -> bool:
    """Plain types only: a list of structs, or text that holds JSON."""
    if is_text(kind):
        return True
    if not pa.types.is_large_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    texts = {field.name for field in kind.value_type if is_text(field.type)}
    return {"role", "content"} <= texts


def _is_scalar(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind) and not pa.types.is_null(kind)
