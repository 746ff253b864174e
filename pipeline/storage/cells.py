"""One input cell becomes a conversation or sampling fields, or one sentence that says why not.

Knows nothing about files or columns. No message quotes what a cell holds: it may be private.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from pipeline.records import Message


class BadCell(ValueError):
    """The cell cannot be used; the message says why, without quoting it."""


def read_text(cell: str) -> str:
    """The prompt as it is; white space counts. Raises BadCell if it is empty."""
    if not cell:
        raise BadCell("the prompt is empty")
    return cell


def read_messages(cell: object) -> list[Message]:
    """A list of {role, content} dicts, or that as JSON text, as plain messages.

    Further string fields are kept for the chat template, null ones dropped. Raises BadCell.
    """
    turns = _read_json(cell) if isinstance(cell, str) else cell
    if not isinstance(turns, list):
        raise BadCell("messages is not a list of {role, content}")
    if not turns:
        raise BadCell("messages holds no message")
    return [_read_message(number, turn) for number, turn in enumerate(turns)]


def _read_message(number: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadCell(f"message {number} is not a {{role, content}} object")
    message = {str(field): value for field, value in turn.items() if value is not None}
    for field in ("role", "content"):
        if field not in message:
            raise BadCell(f"message {number} has no {field}")
    for field, value in message.items():
        if not isinstance(value, str):
            place = field if field in ("role", "content") else "a further field"
            raise BadCell(f"message {number} has {place} of type {type(value).__name__}, not text")
        _check_unicode(value)
    return message


def read_sampling(cell: object) -> dict[str, object]:
    """Sampling fields from a struct or a JSON object; null fields are left out.

    Names and types are checked here, ranges by `SamplingParams`. Raises BadCell.
    """
    fields = _read_json(cell) if isinstance(cell, str) else cell
    if not isinstance(fields, dict):
        raise BadCell("sampling_params is not an object")
    return {
        name: _read_sampling_field(name, value)
        for name, value in fields.items()
        if value is not None
    }


def _read_sampling_field(name: str, value: object) -> object:
    if name not in _SAMPLING_TYPES:
        known = ", ".join(_SAMPLING_TYPES)
        raise BadCell(f"sampling_params has an unknown field; known are {known}")
    wanted, fits = _SAMPLING_TYPES[name]
    if not fits(value):
        raise BadCell(f"{name} in sampling_params must be {wanted}, not {type(value).__name__}")
    if name == "stop":
        return (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_stop(value: object) -> bool:
    stops = [value] if isinstance(value, str) else value
    return isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)


_SAMPLING_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "max_new_tokens": ("an integer", _is_integer),
    "temperature": ("a number", _is_number),
    "top_p": ("a number", _is_number),
    "top_k": ("an integer", _is_integer),
    "seed": ("an integer", _is_integer),
    "stop": ("a non-empty string or a list of them", _is_stop),
    "ignore_eos": ("a boolean", lambda value: isinstance(value, bool)),
}


def _read_json(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCell("the cell is not valid JSON") from None
    return value


def _check_unicode(text: str) -> None:
    # JSON can spell half a surrogate pair; no tokenizer can encode it and no Parquet file hold it.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadCell("a message holds half a surrogate pair, which is not text") from None
