"""What a chat template is given besides messages: `enable_thinking`, tools, and the like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

RESERVED: Final = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "bos_token", "eos_token", "unk_token", "pad_token", "strftime_now", "raise_exception",
)  # fmt: skip
"""What coppice gives itself, or nobody."""


def read_template_arguments(said: Mapping[Any, Any]) -> dict[str, Any]:
    """Arguments by name; a value that is text is read as JSON where it is JSON. Raises ValueError
    for names that are none, or reserved; no value is quoted."""
    arguments: dict[str, Any] = {}
    for key, value in said.items():
        name = str(key).strip()
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name; write it like enable_thinking=false")
        if name in RESERVED:
            raise ValueError(f"{name} is not to be given to a chat template this way; leave it out")
        arguments[name] = _read(value)
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("a value is no JSON; write it like enable_thinking=false") from None
    return arguments


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
