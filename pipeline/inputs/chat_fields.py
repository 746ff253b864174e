"""What a row gives its chat template: tools and the template's own arguments. Knows no template.

```
 tools, tool_choice           the tools that an answer may call; "none": it may call none
 chat_template_kwargs         {"enable_thinking": false}
 reasoning_effort             an argument of the same name, where the template takes one
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pipeline.template_arguments import read_template_arguments

CHAT_FIELDS: Final = ("tools", "tool_choice", "chat_template_kwargs", "reasoning_effort")
GIVEN: Final = "given"
"""Among what a row overrides: what its template is given, see `prompts.ChatPrompt`."""


def read_chat_fields(said: Mapping[str, object]) -> str:
    """What the fields of `CHAT_FIELDS` give a template, as a JSON object; empty: nothing.

    Raises ValueError, which names the field and quotes no value.
    """
    given: dict[str, Any] = {}
    arguments = _parsed(said, "chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError("chat_template_kwargs must be an object")
    given |= read_template_arguments(_without_nulls(arguments))
    effort = said.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise ValueError("reasoning_effort must be text")
        given["reasoning_effort"] = effort
    tools, choice = _tools(_parsed(said, "tools")), said.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ValueError(
            "tool_choice asks for what coppice cannot force; leave it out, or say auto or none"
        )
    if tools and choice == "auto":
        if said.get("parallel_tool_calls") not in (None, True):
            raise ValueError("parallel_tool_calls must be true: nothing stops a second call")
        given["tools"] = tools
    try:
        return json.dumps(given, ensure_ascii=False, allow_nan=False) if given else ""
    except (TypeError, ValueError, RecursionError):
        raise ValueError("tools or chat_template_kwargs hold what is no JSON") from None


def fields_of(given: str) -> dict[str, Any]:
    """The inverse: fields of a request."""
    arguments = json.loads(given)
    fields = {name: arguments.pop(name) for name in ("tools",) if name in arguments}
    return fields | ({"chat_template_kwargs": arguments} if arguments else {})


def read_tool_calls(value: object) -> str:
    """Calls in a message of an earlier turn, as JSON text with arguments as objects, which is what
    templates take. Raises ValueError."""
    calls = _parsed({"tool_calls": value}, "tool_calls")
    if not isinstance(calls, list):
        raise ValueError("tool_calls is not a list")
    return json.dumps([_read_call(call) for call in calls], ensure_ascii=False)


def calls_of_request(text: str) -> list[dict[str, Any]]:
    """The inverse, as a request has them: with arguments as JSON text."""
    calls: list[dict[str, Any]] = json.loads(text)
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return calls


def _read_call(call: object) -> dict[str, Any]:
    said = _without_nulls(call) if isinstance(call, dict) else {}
    function = said.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("tool_calls has a call without the name of a function")
    arguments = _parsed({"arguments": {}} | function, "arguments")
    if not isinstance(arguments, dict):
        raise ValueError("tool_calls has a call whose arguments are no object")
    return {**said, "function": {**function, "arguments": arguments}}


def _tools(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError("tools must be a list of functions")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("tools must be a list of functions, each with a name")
        if tool.get("type", "function") != "function":
            raise ValueError("tools holds one that is no function")
        if not isinstance(function.get("parameters") or {}, dict):
            raise ValueError("tools has a function whose parameters are no object")
        if function.get("strict") not in (None, False):
            raise ValueError(
                "tools has a function with strict, and nothing holds calls to their parameters; "
                "leave strict out"
            )
    return [_without_nulls(tool) for tool in value]


def _parsed(said: Mapping[str, object], name: str) -> Any:
    """A field. Objects and lists may be JSON text, as a column of a table has them."""
    value = said.get(name)
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(f"{name} must be an object or a list, and is no JSON") from None


def _without_nulls(value: Any) -> Any:
    """Without fields that are null, which a table puts where one row has a field and others not."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
