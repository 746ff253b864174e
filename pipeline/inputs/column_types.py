"""Of which types a column may be that plays a part. Knows nothing about rows."""

from __future__ import annotations

import pyarrow as pa

from pipeline.inputs.request_fields import AMBIGUOUS, OBEYED, REFUSED
from pipeline.storage.plain_types import is_text


def is_request_field(field: pa.Field) -> bool:
    """Whether a column says what a field of a request would, by its name and type."""
    kind = field.type
    if field.name in AMBIGUOUS:
        return False
    match OBEYED.get(field.name):
        case None:
            return field.name in REFUSED or field.name == "parallel_tool_calls"
        case "stop" | "bad_words":
            return is_text(kind) or (pa.types.is_large_list(kind) and is_text(kind.value_type))
        case "constraint":
            return is_json(kind) or is_texts(kind)
        case "ignore_eos" | "include_stop_str_in_output" | "skip_special_tokens":
            return bool(pa.types.is_boolean(kind))
        case "allowed_token_ids" | "stop_token_ids":
            is_list = pa.types.is_large_list(kind)
            return is_text(kind) or bool(is_list and pa.types.is_integer(kind.value_type))
        case "logit_bias":
            return is_text(kind) or bool(pa.types.is_struct(kind) or pa.types.is_map(kind))
        case "logprobs":
            return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind))
    return is_number(kind)


def is_json(kind: pa.DataType) -> bool:
    """Text that holds JSON, or a struct."""
    return is_text(kind) or bool(pa.types.is_struct(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whole, floating or decimal."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(fits(kind) for fits in kinds)


def is_plain_text(kind: pa.DataType) -> bool:
    """Text that is not marked as JSON."""
    return is_text(kind) and not isinstance(kind, pa.JsonType)


def is_conversation(kind: pa.DataType) -> bool:
    """Plain types only: a list of structs, or text that holds JSON."""
    if is_text(kind):
        return True
    if not pa.types.is_large_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    types = {field.name: field.type for field in kind.value_type}
    content = types.get("content", pa.null())
    is_parts = pa.types.is_large_list(content)
    return is_text(types.get("role", pa.null())) and (is_text(content) or is_parts)


def is_segments(kind: pa.DataType) -> bool:
    """Plain types only: a list of structs, or text that holds JSON."""
    if is_text(kind):
        return True
    if not pa.types.is_large_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    types = {field.name: field.type for field in kind.value_type}
    return all(is_text(types.get(name, pa.null())) for name in ("role", "text"))


def is_texts(kind: pa.DataType) -> bool:
    """A list of texts, or of nothing."""
    if not pa.types.is_large_list(kind):
        return False
    return is_text(kind.value_type) or bool(pa.types.is_null(kind.value_type))


def is_scalar(kind: pa.DataType) -> bool:
    """Neither nested nor of nothing."""
    return not pa.types.is_nested(kind) and not pa.types.is_null(kind)
