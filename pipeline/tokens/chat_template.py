"""Conversations become text by the model's own template. Knows nothing about token ids.

A template is code of the model's: it runs in a sandbox, in a process of its own with limits of time
and memory. What it says when it fails may quote the conversation, so only words that stand in the
template itself become part of the reason.

The same conversation must become the same prompt at every resume: the time that a template prints
is that of the job's clock, and one that draws lots is refused. No message may vanish either: the
text of each must stand in the rendering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from pipeline.confined import Confined, Ended, Fault, NotMade
from pipeline.errors import UsageError
from pipeline.prompts import Message
from pipeline.tokens.chat_renderer import CLOCK_NAME, ChatRenderer, make_environment

_MOST_SECONDS = 10.0  # for a conversation
_MOST_SLOW_ROWS = 10  # one after another
_GRACE_S = 1.0  # before a single step that does not end is ended with its process
_SHOWN_CHARACTERS = 32  # of a role
_END_OF_REASONING = "</think>"
_LOSES_CALLS = (
    "the chat template leaves out the tool_calls of a message; pass another with --chat-template"
)


class TemplateFault(ValueError):
    """The template refuses this conversation; the message says why, without quoting it."""

    def __init__(self, message: str, error_type: str | None = None) -> None:
        """`error_type`: one of its own; None: that of any prompt that cannot be used."""
        super().__init__(message)
        self.error_type = error_type


@dataclass
class ChatTemplate:
    """A Jinja template, the tokenizer (of transformers) whose tokens it names, its `clock`, and
    `arguments` that it is given with every conversation."""

    source: str
    tokenizer: Any
    clock: datetime
    num_slow: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_clock(self) -> bool:
        """Whether the prompts may depend on the clock."""
        return CLOCK_NAME in self.source

    @cached_property
    def names(self) -> frozenset[str]:
        """What it asks for. Raises UsageError if it is not valid Jinja."""
        return frozenset(
            n.name for n in self._parsed.find_all(jinja2.nodes.Name) if n.ctx == "load"
        )

    def check_arguments(self) -> None:
        """Raises UsageError for an argument that it does not take: it would do nothing."""
        unknown = next((name for name in self.arguments if name not in self.names), None)
        if unknown is not None:
            raise UsageError(
                f"the chat template takes no {unknown!r}; correct --chat-template-kwargs, or pass "
                "another template with --chat-template"
            )

    def render(self, messages: list[Message], given: str = "{}") -> str:
        """The whole prompt, up to where the assistant's answer begins.

        Raises TemplateFault if this conversation does not fit, loses a message or takes too long,
        UsageError as `render_all`.
        """
        (text,) = self.render_all([messages], [given])
        if isinstance(text, TemplateFault):
            raise text
        return text

    def render_all(
        self, conversations: Sequence[list[Message]], given: Sequence[str] | None = None
    ) -> list[str | TemplateFault]:
        """Each conversation as text, or why it is none. `given`: to each besides, see `ChatPrompt`.

        Raises UsageError if the template is not valid Jinja, draws lots, or takes too long on many
        rows.
        """
        try:
            items = conversations if given is None else list(zip(conversations, given, strict=True))
            results = self._renderer.map(items)
        except NotMade as error:
            raise UsageError(
                f"the chat template {error}; pass another with --chat-template"
            ) from error
        return [self._text(*pair) for pair in zip(conversations, results, strict=True)]

    @cached_property
    def _parsed(self) -> jinja2.nodes.Template:
        try:
            parsed = make_environment(self.clock).parse(self.source)
            refuse_lots(self.source)
            return parsed
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "correct it or pass another with --chat-template"
            ) from error
        except RecursionError as error:
            raise UsageError(
                "the chat template is nested too deep; pass another with --chat-template"
            ) from error

    @cached_property
    def _renderer(self) -> Confined:
        assert self._parsed
        tokens = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        arguments = (self.source, tokens, self.clock, _MOST_SECONDS, dict(self.arguments))
        return Confined(ChatRenderer, arguments, _MOST_SECONDS * 1.2 + _GRACE_S)

    def _text(self, messages: list[Message], result: str | Fault | Ended) -> str | TemplateFault:
        if isinstance(result, str):
            self.num_slow = 0
            if self._loses_calls(messages):
                return TemplateFault(_LOSES_CALLS, "BadMessages")
            missing = find_missing(messages, result)
            return result if missing is None else TemplateFault(missing)
        if isinstance(result, Ended):
            taken = f"over {_MOST_SECONDS:g} s" if result.is_slow else "all memory"
            message = f"the chat template takes {taken} on this conversation"
            result = Fault(message, result.is_slow)
        self.num_slow = self.num_slow + 1 if result.is_slow else 0
        if self.num_slow >= _MOST_SLOW_ROWS:
            raise UsageError(
                f"the chat template takes over {_MOST_SECONDS:g} s on row after row; "
                "pass another with --chat-template"
            )
        return TemplateFault(result.message)

    def _loses_calls(self, messages: list[Message]) -> bool:
        return "tool_calls" not in self.source and any("tool_calls" in m for m in messages)


def find_missing(messages: list[Message], rendered: str) -> str | None:
    """Says which message's text has no copy of its own in the rendering; None: each has one.

    White space at its ends does not count, and of an answer that begins with reasoning
    (`<think>`) what follows that is enough: templates leave the reasoning of earlier turns out.
    """
    at = 0
    for message in messages:  # in order, as nearly every template writes them
        text = message["content"].strip()
        at = rendered.find(text, at)
        if at < 0:
            break
        at += len(text)
    else:
        return None
    left = rendered
    longest_first = sorted(messages, key=lambda message: -len(message["content"].strip()))
    for message in longest_first:
        text = message["content"].strip()
        if text not in left:
            text = text.rpartition(_END_OF_REASONING)[2].strip()
        if text not in left:
            role = message["role"] if message["role"].isidentifier() else "unnamed"
            number = next(i for i, m in enumerate(messages, 1) if m is message)
            return (
                f"the chat template leaves out the text of message {number}, of the role "
                f"{role[:_SHOWN_CHARACTERS]!r}; give it another role that the template knows, or "
                "pass another template with --chat-template"
            )
        left = left.replace(text, "\0", 1) if text else left
    return None


def refuse_lots(source: str) -> None:
    """Raises UsageError if a second rendering could differ, TemplateSyntaxError."""
    before = ""
    for line, kind, text in jinja2.Environment().lex(source):
        is_filter = (kind, text, before) == ("name", "random", "|")
        is_mapped = kind == "string" and text[1:-1] == "random" and before == "("
        if is_filter or is_mapped or (kind, text) == ("name", "lipsum"):
            raise UsageError(
                f"the chat template, line {line}, draws lots ({text}), so that no run "
                "could be resumed or audited; pass another with --chat-template"
            )
        before = before if kind == "whitespace" else text


def find_template(
    tokenizer: Any,
    override: Path | None,
    clock: datetime | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ChatTemplate | None:
    """The template in the file `override`, else the tokenizer's own, if any. Raises UsageError.

    `clock` None: today, as it begins, on which all sessions and shards of a day agree.
    """
    clock = clock or datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    if override is not None:
        try:
            source = override.read_text(encoding="utf-8")
            return ChatTemplate(source, tokenizer, clock, arguments=arguments or {})
        except (OSError, UnicodeError) as error:
            raise UsageError(
                f"cannot read the chat template {override} ({error}); correct --chat-template"
            ) from error
    if not tokenizer.chat_template:
        return None
    try:
        source = tokenizer.get_chat_template()
        return ChatTemplate(source, tokenizer, clock, arguments=arguments or {})
    except ValueError as error:
        raise UsageError(
            "the model has several chat templates and none is the default; "
            "choose one with --chat-template"
        ) from error
