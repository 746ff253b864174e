"""A model's chat template at work, in a process of its own. Knows no tokenizer.

The environment is that of `transformers`, which a process for templates alone is not to import; a
test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.confined import Fault
from pipeline.namespace import SafeNamespace
from pipeline.time_limit import TimeLimit, TookTooLong

if TYPE_CHECKING:
    from pipeline.prompts import Message  # which brings pydantic; this is started for each template

CLOCK_NAME = "strftime_now"  # the only way to the time that transformers gives a template
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the first leads
_GIVEN = {"tools": None, "documents": None, "add_generation_prompt": True}


class ChatRenderer:
    """A compiled template. Raises what Jinja and Python raise of one that is none."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, Any],
        clock: datetime,
        seconds: float,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`arguments`: what the template is given with every conversation."""
        self._source = source
        self._given = {**_GIVEN, **(arguments or {})}
        self._special_tokens = dict(special_tokens)
        self._template = make_environment(clock).from_string(source)
        self._limit = TimeLimit(seconds)

    def __call__(self, item: list[Message] | tuple[list[Message], str]) -> str | Fault:
        """The conversation as text, up to where the assistant's answer begins. An item is its
        messages, or these and what it is given besides, as a JSON object."""
        messages, own = item if isinstance(item, tuple) else (item, "{}")
        try:
            with self._limit:
                chat = [_with_calls(_with_reasoning(message)) for message in messages]
                given = self._special_tokens | self._given | json.loads(own)
                return self._template.render(messages=chat, **given)
        except TookTooLong:
            most = self._limit.seconds
            return Fault(f"the chat template takes over {most:g} s on this conversation", True)
        except Exception as error:  # a template is code: it can raise anything
            said = str(error)
            detail = f": {said}" if said and said in self._source else ""
            kind = type(error).__name__
            return Fault(f"the chat template refuses the conversation ({kind}{detail})")


def make_environment(clock: datetime) -> jinja2.Environment:
    """Where chat templates, which take `clock` for now, are compiled; nothing is computed yet."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals[CLOCK_NAME] = clock.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = SafeNamespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said; it is printed as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body)
        return call.set_lineno(line)

    def _print(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` without attributes that lead out of a sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _with_reasoning(message: Message) -> dict[str, Any]:
    """What a model thought has three names; templates know one or two of them."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Calls of tools are JSON text until here; templates take lists, and arguments as objects."""
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": json.loads(message["tool_calls"])}
