"""How answers call tools, where a model says it, and the calls of an answer. Knows no files.

Two things say it: a response template beside the tokenizer, which transformers reads, and a chat
template that writes each call of an earlier turn as one JSON object between two tags:

```
 <tool_call>\\n{"name": "find", "arguments": {"q": "x"}}\\n</tool_call>
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from pipeline.confined import Confined, NotMade
from pipeline.prompts import Message
from pipeline.tokens.chat_template import TemplateFault
from pipeline.tokens.response_reader import ResponseReader

_NAME, _KEY, _VALUE = "ztool", "zkey", "zvalue"
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
_ARGUMENTS = ("arguments", "parameters")
_SECONDS = 10.0  # for the answers of a stranger's response template


class ToolCall(NamedTuple):
    """`arguments`: a JSON object, as text."""

    name: str
    arguments: str


class Answered(NamedTuple):
    """What an answer says beside its calls, and these."""

    text: str
    calls: tuple[ToolCall, ...]


class ToolCallFormat(Protocol):
    """Reads the calls of answers."""

    @property
    def needs_control_tokens(self) -> bool:
        """Whether control tokens are part of what is read."""

    def read_all(self, texts: Sequence[str]) -> list[Answered]:
        """The calls of each answer. What is no call, or an incomplete one, stays text."""


@dataclass(frozen=True)
class TaggedCalls:
    """Calls as JSON objects between two tags."""

    begin: str
    end: str

    needs_control_tokens = False

    def read_all(self, texts: Sequence[str]) -> list[Answered]:
        return [self._read(text) for text in texts]

    def _read(self, text: str) -> Answered:
        calls: list[ToolCall] = []
        kept, start = [], 0
        while (at := text.find(self.begin, start)) >= 0:
            behind = at + len(self.begin)
            stop = text.find(self.end, behind)
            if stop < 0:
                break
            call = _call_of(text[behind:stop])
            after = stop + len(self.end)
            kept.append(text[start:at] if call else text[start:after])
            calls += [call] if call else []
            start = after
        if not calls:
            return Answered(text, ())
        return Answered("".join([*kept, text[start:]]).strip(), tuple(calls))


@dataclass(frozen=True)
class DeclaredCalls:
    """Calls as a response template of transformers has them. It is a stranger's, with patterns that
    may take for ever, so it is read in a process of its own."""

    template: str

    needs_control_tokens = True

    @cached_property
    def _reader(self) -> Confined:
        return Confined(ResponseReader, (self.template,), _SECONDS)

    def can_be_read(self) -> bool:
        """Whether transformers takes the template for one."""
        try:
            self._reader.start()
        except NotMade:
            return False
        return True

    def read_all(self, texts: Sequence[str]) -> list[Answered]:
        found = self._reader.map(list(texts))
        return [
            _of_message(json.loads(said), text) if isinstance(said, str) else Answered(text, ())
            for text, said in zip(texts, found, strict=True)
        ]


def find_format(
    tokenizer: Any, render: Callable[[list[Message], str], str]
) -> ToolCallFormat | None:
    """How the model's files say that answers call tools; None: they do not. `render`: its chat
    template."""
    declared = getattr(tokenizer, "response_template", None)
    fields = declared.get("fields") if isinstance(declared, Mapping) else None
    if isinstance(fields, Mapping) and "tool_calls" in fields:
        calls = DeclaredCalls(json.dumps(declared))
        return calls if calls.can_be_read() else None
    tool = {"name": _NAME, "description": "?", "parameters": {"type": "object", "properties": {}}}
    call = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    messages: list[Message] = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": json.dumps([{"type": "function", "function": call}]),
        },
    ]
    given = json.dumps({"tools": [{"type": "function", "function": tool}]})
    try:
        tags = _tags_in(render(messages, given))
    except TemplateFault:
        return None
    special = set(map(str, tokenizer.all_special_tokens))  # which no answer's text shows
    return None if tags is None or special & set(tags) else TaggedCalls(*tags)


def _tags_in(rendered: str) -> tuple[str, str] | None:
    """The words around the probe's call; None where it is not JSON between tags."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", rendered):
        try:
            value, stop = decoder.raw_decode(rendered, match.start())
        except (ValueError, RecursionError):
            continue
        if not _is_probe(value):
            continue
        before, after = rendered[: match.start()].split(), rendered[stop:].split()
        begin, end = (before or [""])[-1], (after or [""])[0]
        begins, ends = list(_TAG.finditer(begin)), _TAG.match(end)
        if begins and ends and begins[-1].end() == len(begin):
            return begins[-1][0], ends[0]
        return None
    return None


def _is_probe(value: object) -> bool:
    if not isinstance(value, dict) or value.get("name") != _NAME:
        return False
    return any(value.get(name) == {_KEY: _VALUE} for name in _ARGUMENTS)


def _call_of(text: str) -> ToolCall | None:
    """None: it is no call."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _call(value)


def _call(value: object) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = next((value[name] for name in _ARGUMENTS if name in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        call = ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode()
    except (ValueError, RecursionError):  # NaN is no JSON, and half a surrogate pair no text
        return None
    return call


def _of_message(message: Mapping[str, Any], text: str) -> Answered:
    """What transformers has read of an answer."""
    said = message.get("tool_calls") or []
    calls = [_call(c.get("function", c)) for c in said if isinstance(c, dict)]
    if not calls or None in calls:
        return Answered(text, ())
    return Answered(str(message.get("content") or "").strip(), tuple(c for c in calls if c))
