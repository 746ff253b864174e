"""Conversations become text by the model's own template. Knows nothing about token ids.

A template is code of the model's: `transformers` runs it in a sandbox, and here for a limited time.
A time limit cannot end a single step, so those that could take for ever, powers and huge numbers,
are refused. Its memory has no limit but the process's. What it says when it fails may quote the
conversation, so only words that stand in the template itself become part of the reason.

The same conversation must become the same prompt at every resume: the time that a template prints
is that of the job's clock, and one that draws lots is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
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
_CLOCK_NAME = "strftime_now"  # the only way to the time that transformers gives a template
_now: ContextVar[datetime] = ContextVar("_now")


class TemplateFault(ValueError):
    """The template refuses this conversation; the message says why, without quoting it."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a Jinja template, and the tokenizer (of transformers) that runs it.

    `clock`: what the template takes for now.
    """

    source: str
    tokenizer: Any
    clock: datetime
    limit: TimeLimit = field(default_factory=lambda: TimeLimit(_MOST_SECONDS), compare=False)

    @property
    def reads_clock(self) -> bool:
        """Whether the prompts may depend on the clock."""
        return _CLOCK_NAME in self.source

    @cached_property
    def endless(self) -> str | None:
        """Why a single step could take for ever, or a second rendering differ; or None."""
        before = ""
        try:
            for line, kind, text in jinja2.Environment().lex(self.source):
                if _draws_lots(kind, text, before):
                    return (
                        f"the chat template, line {line}, draws lots ({text}), so that no run "
                        "could be resumed or audited; pass another with --chat-template"
                    )
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

        Raises TemplateFault if this conversation does not fit or takes too long, UsageError if the
        template is not valid Jinja, holds what could take for ever, or takes too long on many rows.
        """
        if self.endless is not None:
            raise UsageError(self.endless)
        try:
            with self.limit, self._at_its_time():
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
        return str(text)

    @contextmanager
    def _at_its_time(self) -> Iterator[None]:
        """Within it the template's `strftime_now` asks our clock."""
        if not self.reads_clock:
            yield
            return
        # transformers compiles each text once, keeps it, and lets no function in as an argument.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(self.source).globals[_CLOCK_NAME] = _strftime_now
        before = _now.set(self.clock)
        try:
            yield
        finally:
            _now.reset(before)

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


def _draws_lots(kind: str, text: str, before: str) -> bool:
    is_filter = (kind, text, before) == ("name", "random", "|")
    is_mapped = kind == "string" and text[1:-1] == "random" and before == "("
    return is_filter or is_mapped or (kind, text) == ("name", "lipsum")


def _strftime_now(format: str) -> str:
    return _now.get().strftime(format)


def _start_of_today() -> datetime:
    """A moment that all sessions and shards of a day agree on."""
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)


def find_template(
    tokenizer: Any, override: Path | None, clock: datetime | None = None
) -> ChatTemplate | None:
    """The template in the file `override`, else the tokenizer's own, if any. Raises UsageError.

    `clock` None: today, as it begins.
    """
    clock = clock or _start_of_today()
    if override is not None:
        try:
            return ChatTemplate(override.read_text(encoding="utf-8"), tokenizer, clock)
        except (OSError, UnicodeError) as error:
            raise UsageError(
                f"cannot read the chat template {override} ({error}); correct --chat-template"
            ) from error
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer, clock)
    except ValueError as error:
        raise UsageError(
            "the model has several chat templates and none is the default; "
            "choose one with --chat-template"
        ) from error
