"""`--generation-options` as a person writes them. Says what may be written, not what it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pipeline.generation import PLAIN, REFUSED, RULES, parse_rules
from pipeline.request_rules import REQUEST_RULES, write_asked

_WITH_FLAGS: Final = {
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "max_new_tokens": "--max-new-tokens",
    "stop_strings": "--stop",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "logprobs": "--logprobs",
    "n": "--n",
}


def read_generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`--generation-options` with their values as JSON means them. Raises ValueError."""
    known = {*RULES, *REFUSED, *PLAIN, *REQUEST_RULES} - _WITH_FLAGS.keys()
    found = {}
    for written, value in options.items():
        name = str(written).strip().replace("-", "_")
        if name in _WITH_FLAGS:
            raise ValueError(f"{name} has a flag of its own, {_WITH_FLAGS[name]}")
        if name not in known:
            raise ValueError(
                f"there is no option {written!r}; known are {', '.join(sorted(known))}"
            )
        found[name] = _read_json(value)
    parse_rules(found)
    write_asked({name: found[name] for name in REQUEST_RULES if name in found})
    return found


def _read_json(value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
