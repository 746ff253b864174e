"""Conversations become text by the model's own template. Knows nothing about token ids.

A template is code of the model's: it runs in a sandbox, in a process of its own with limits of time
and memory. What it says when it fails may quote the conversation, so only words that stand in the
template itself become part of the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from pipeline.confined import Confined, Ended
from pipeline.errors import UsageError
from pipeline.records import Message
from pipeline.tokens.chat_renderer import ChatRenderer, Fault, make_environment

_MOST_SECONDS = 10.0  # for a conversation
_MOST_SLOW_ROWS = 10
_GRACE_S = 1.0  # before a single step that does not end is ended with its process
_NOT_COMPILED = (RecursionError, ValueError, ArithmeticError, MemoryError)


class TemplateFault(ValueError):
    """The template refuses this conversation; the message says why, without quoting it."""


@dataclass
class ChatTemplate:
    """The text of a Jinja template, and the tokenizer (of transformers) whose tokens it names."""

    source: str
    tokenizer: Any
    num_slow: int = 0

    def render(self, messages: list[Message]) -> str:
        """The whole prompt, up to where the assistant's answer begins.

        Raises TemplateFault if this conversation does not fit or takes too long, UsageError as
        `render_all`.
        """
        (text,) = self.render_all([messages])
        if isinstance(text, TemplateFault):
            raise text
        return text

    def render_all(self, conversations: Sequence[list[Message]]) -> list[str | TemplateFault]:
        """Each conversation as text, or why it is none.

        Raises UsageError if the template is not valid Jinja or takes too long on many rows.
        """
        return [self._text(result) for result in self._renderer.map(conversations)]

    @cached_property
    def _renderer(self) -> Confined:
        try:
            make_environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "correct it or pass another with --chat-template"
            ) from error
        except (SyntaxError, *_NOT_COMPILED) as error:  # Python's, of the code that Jinja wrote
            said = error.msg if isinstance(error, SyntaxError) else type(error).__name__
            raise UsageError(
                f"the chat template cannot be compiled ({said}); pass another with --chat-template"
            ) from error
        tokens = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        arguments = (self.source, tokens, _MOST_SECONDS)
        return Confined(ChatRenderer, arguments, _MOST_SECONDS * 1.2 + _GRACE_S)

    def _text(self, result: str | Fault | Ended) -> str | TemplateFault:
        if isinstance(result, str):
            return result
        if isinstance(result, Ended):
            taken = f"over {_MOST_SECONDS:g} s" if result.is_slow else "all memory"
            message = f"the chat template takes {taken} on this conversation"
            result = Fault(message, result.is_slow)
        self.num_slow += result.is_slow
        if self.num_slow >= _MOST_SLOW_ROWS:
            raise UsageError(
                f"the chat template takes over {_MOST_SECONDS:g} s on row after row; "
                "pass another with --chat-template"
            )
        return TemplateFault(result.message)


def find_template(tokenizer: Any, override: Path | None) -> ChatTemplate | None:
    """The template in the file `override`, else the tokenizer's own, if any. Raises UsageError."""
    if override is not None:
        try:
            return ChatTemplate(override.read_text(encoding="utf-8"), tokenizer)
        except (OSError, UnicodeError) as error:
            raise UsageError(
                f"cannot read the chat template {override} ({error}); correct --chat-template"
            ) from error
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer)
    except ValueError as error:
        raise UsageError(
            "the model has several chat templates and none is the default; "
            "choose one with --chat-template"
        ) from error
