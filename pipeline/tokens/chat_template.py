"""Conversations become text by the model's own template. Knows nothing about token ids.

A template is code of the model's: `transformers` runs it in a sandbox, and here for a limited time.
A time limit cannot end a single step, so those that could take for ever, powers and huge numbers,
are refused. Its memory has no limit but the process's. What it says when it fails may quote the
conversation, so only words that stand in the template itself become part of the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from pipeline.errors import UsageError
from pipeline.records import Message
from pipeline.time_limit import TimeLimit, TookTooLong

_MOST_SECONDS = 10.0  # for a conversation
_MOST_SLOW_ROWS = 10
_MOST_DIGITS = 8  # of a number in the template
_SHOWN_CHARACTERS = 32  # of a role
_END_OF_REASONING = "</think>"


class TemplateFault(ValueError):
    """The template refuses this conversation; the message says why, without quoting it."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a Jinja template, and the tokenizer (of transformers) that runs it."""

    source: str
    tokenizer: Any
    limit: TimeLimit = field(default_factory=lambda: TimeLimit(_MOST_SECONDS), compare=False)

    @cached_property
    def endless(self) -> str | None:
        """Why a single step of the template could take for ever, or None."""
        before = ""
        try:
            for line, kind, text in jinja2.Environment().lex(self.source):
                is_power = (kind, text) == ("operator", "**") and before not in ("(", ",")
                if is_power or (kind == "integer" and len(text) > _MOST_DIGITS):
                    what = "a power" if is_power else "a huge number"
                    return (
                        f"the chat template, line {line}, computes with {what}, which could take "
                        "for ever; pass another with --chat-template"
                    )
                before = before if kind == "whitespace" else text
        except jinja2.TemplateSyntaxError:
            pass  # said when it is rendered
        return None

    def render(self, messages: list[Message]) -> str:
        """The whole prompt, up to where the assistant's answer begins.

        Raises TemplateFault if this conversation does not fit, loses a message or takes too long;
        UsageError if the template is not valid Jinja, holds what could take for ever, or takes too
        long on many rows.
        """
        if self.endless is not None:
            raise UsageError(self.endless)
        try:
            with self.limit:
                text = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.source, add_generation_prompt=True, tokenize=False
                )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "correct it or pass another with --chat-template"
            ) from error
        except SyntaxError as error:  # Python's, of the code that Jinja wrote
            raise UsageError(
                f"the chat template cannot be compiled ({error.msg}); pass another with "
                "--chat-template"
            ) from error
        except TookTooLong:
            self._check_patience()
            raise TemplateFault(
                f"the chat template takes over {self.limit.seconds:g} s on this conversation"
            ) from None
        except Exception as error:  # a template is code: it can raise anything
            raise TemplateFault(self._reason(error)) from None
        check_completeness(messages, str(text))
        return str(text)

    def _check_patience(self) -> None:
        if self.limit.num_ended >= _MOST_SLOW_ROWS:
            raise UsageError(
                f"the chat template takes over {self.limit.seconds:g} s on row after row; "
                "pass another with --chat-template"
            ) from None

    def _reason(self, error: Exception) -> str:
        said = str(error)
        detail = f": {said}" if said and said in self.source else ""
        return f"the chat template refuses the conversation ({type(error).__name__}{detail})"


def check_completeness(messages: list[Message], rendered: str) -> None:
    """Raises TemplateFault unless the text of every message stands in the rendering, its own copy.

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
        return
    left = rendered
    longest_first = sorted(messages, key=lambda message: -len(message["content"].strip()))
    for message in longest_first:
        text = message["content"].strip()
        if text not in left:
            text = text.rpartition(_END_OF_REASONING)[2].strip()
        if text not in left:
            role = message["role"] if message["role"].isidentifier() else "unnamed"
            number = next(i for i, m in enumerate(messages, 1) if m is message)
            raise TemplateFault(
                f"the chat template leaves out the text of message {number}, of the role "
                f"{role[:_SHOWN_CHARACTERS]!r}; give it another role that the template knows, or "
                "pass another template with --chat-template"
            )
        left = left.replace(text, "\0", 1) if text else left


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
