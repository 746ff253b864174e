"""Conversations become text by the model's own template. Knows nothing about token ids.

A template is code: `transformers` runs it in a sandbox. What it says when it fails may quote the
conversation, and is then left out of the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipeline.errors import UsageError
from pipeline.records import Message


class TemplateFault(ValueError):
    """The template refuses this conversation; the message says why, without quoting it."""


# What code in the sandbox can raise on an unexpected conversation.
_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError,
    AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a Jinja template, and the tokenizer (of transformers) that runs it."""

    source: str
    tokenizer: Any

    def render(self, messages: list[Message]) -> str:
        """The whole prompt, up to where the assistant's answer begins.

        Raises TemplateFault if this conversation does not fit, UsageError if the template is not
        valid Jinja.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "correct it or pass another with --chat-template"
            ) from error
        except _FAULTS as error:
            raise TemplateFault(_reason(error, messages)) from error
        return str(text)


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


def _reason(error: Exception, messages: list[Message]) -> str:
    said = str(error)
    quotes = any(value in said for message in messages for value in message.values() if value)
    detail = "" if quotes else f": {said}"
    return f"the chat template refuses the conversation ({type(error).__name__}{detail})"
