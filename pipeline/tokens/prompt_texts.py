"""Prompts as text, which settings and a chat template decide. Knows no token ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeGuard

from pipeline.errors import UsageError
from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import (
    AskedPrompt,
    ChatPrompt,
    Content,
    Message,
    ScoredPrompt,
    SegmentedPrompt,
    TurnPrompt,
)
from pipeline.tokens.chat_template import ChatTemplate, TemplateFault
from pipeline.tokens.given import as_taken
from pipeline.tokens.segments import Chat, as_messages
from pipeline.tokens.turns import LaterTurns


class PromptTexts:
    """`template`: None where the model has none; `thinks`: whether the model thinks; `name`: of
    the model. Raises UsageError where the settings ask for a template that is not there, or for
    what it does not take."""

    def __init__(
        self,
        template: ChatTemplate | None,
        settings: TokenSettings,
        thinks: Callable[[], bool],
        name: str,
    ) -> None:
        self.template = template
        self._settings = settings
        self._thinks = thinks
        self._name = name
        if settings.apply_chat_template:
            self.require_template()
        if settings.chat_template_kwargs:
            self.require_template().check_arguments()

    def require_template(self) -> ChatTemplate:
        """Raises UsageError where there is none."""
        if self.template is None:
            raise UsageError(f"{self._name} has no chat template; pass one with --chat-template")
        return self.template

    def refuse_system_prompt(self) -> None:
        """Raises UsageError where one is asked for: plain text has no place for it."""
        if self._settings.system_prompt is not None:
            raise UsageError(
                "a system prompt needs a chat template: add --apply-chat-template or drop "
                "--system-prompt"
            )

    def check_fits(self, are_messages: bool) -> None:
        """Raises UsageError where the settings fit no row."""
        if are_messages or self._settings.apply_chat_template:
            self.require_template()
        else:
            self.refuse_system_prompt()

    def is_plain(self, content: Content) -> TypeGuard[str]:
        """Whether it goes through no template."""
        return isinstance(content, str) and not self._settings.apply_chat_template

    def complete(self, content: str | list[Message]) -> list[Message]:
        """The conversation; the system prompt comes first unless the row brings its own."""
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        system = self._settings.system_prompt
        if system is None or (messages and messages[0].get("role") == "system"):
            return messages
        return [{"role": "system", "content": system}, *messages]

    @property
    def chat(self) -> Chat:
        """How conversations become text. Raises UsageError where there is no template."""
        return Chat(self.complete, self.require_template().render_all)

    @cached_property
    def later(self) -> LaterTurns:
        """How the template writes turns. Raises UsageError where there is none."""
        return LaterTurns(self.chat)

    def taken(self, prompt: ChatPrompt) -> ChatPrompt:
        """The prompt as its template takes it; see `as_taken`."""
        template = None if self.is_plain(prompt.content) else self.template
        return as_taken(template, prompt, self._thinks)

    def in_one_piece(self, prompt: SegmentedPrompt) -> str | list[Message]:
        """The same text as a prompt whose segments nobody knows."""
        documents = "".join(prompt.documents)
        if self._settings.apply_chat_template:
            return as_messages(prompt, documents)
        return prompt.preamble + documents + prompt.question

    def render(self, content: Content) -> str:
        """The text that is tokenised, in segments or not; of a later turn what it adds, of what is
        scored the context, of questions that of the first. Raises TemplateFault if the template
        refuses."""
        if isinstance(content, AskedPrompt):
            content = content.prompts[0]
        if isinstance(content, ScoredPrompt):
            content = content.context
        if isinstance(content, ChatPrompt):
            prompt = self.taken(content)
            if prompt.given != "{}":
                return self.require_template().render(self.complete(prompt.content), prompt.given)
            content = prompt.content
        if isinstance(content, TurnPrompt):
            if not content.is_first and not self.is_plain(content.content):
                (text,) = self.later.render([self.later.behind(content.content)])
                if isinstance(text, TemplateFault):
                    raise text
                return text
            content = content.content
        if isinstance(content, SegmentedPrompt):
            content = self.in_one_piece(content)
        if self.is_plain(content):
            self.refuse_system_prompt()
            return content
        return self.require_template().render(self.complete(content))
