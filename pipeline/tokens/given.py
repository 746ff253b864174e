"""What rows give their chat template besides messages: whether it takes it, and rendered with it.

It stands behind the messages of its conversation as if it were one more, so that whatever hides
control tokens in these hides those in it as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.prompts import ChatPrompt, Message
from pipeline.tokens.chat_template import ChatTemplate, TemplateFault

_GIVEN = "given"
_EFFORT = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")
"""Arguments that templates are told not to think by."""


def with_given(
    chats: Mapping[int, list[Message]], given: Mapping[int, str]
) -> dict[int, list[Message]]:
    """The conversations by row, and behind each what it is given."""
    return {
        row: [*messages, {_GIVEN: given[row]}] if row in given else messages
        for row, messages in chats.items()
    }


def render_given(
    template: ChatTemplate, is_given: Sequence[bool], chats: Sequence[list[Message]]
) -> list[str | TemplateFault]:
    """Conversations as `with_given` makes them, by the template in full."""
    if not any(is_given):
        return template.render_all(chats)
    messages = [c[:-1] if own else c for c, own in zip(chats, is_given, strict=True)]
    given = [c[-1][_GIVEN] if own else "{}" for c, own in zip(chats, is_given, strict=True)]
    found = template.render_all(messages, given)
    return [_without_lost_tools(text, own) for text, own in zip(found, given, strict=True)]


def as_taken(
    template: ChatTemplate | None, prompt: ChatPrompt, thinks: Callable[[], bool]
) -> ChatPrompt:
    """The same, where no effort is no thinking to a template that has a switch for it, and nothing
    to a model that does not think; `template`: None where none is used."""
    arguments = json.loads(prompt.given)
    names = frozenset[str]() if template is None else template.names
    if arguments.get(_EFFORT) != "none" or _EFFORT in names:
        return prompt
    switch = next((name for name in _SWITCHES if name in names), None)
    if switch is not None:
        arguments = {switch: False} | arguments
    elif template is not None and thinks():
        return prompt  # to be refused
    del arguments[_EFFORT]
    return replace(prompt, given=json.dumps(arguments, ensure_ascii=False))


def why_not_given(template: ChatTemplate, given: str, can_call: bool) -> str | None:
    """Why the template cannot be given this, or None; `can_call`: somebody says how answers call
    tools."""
    arguments = json.loads(given)
    unknown = next((name for name in arguments if name not in template.names), None)
    if unknown is not None:
        return f"the row gives {unknown}, which the chat template does not take; leave it out"
    if "tools" in arguments and not can_call:
        return (
            "the row has tools, and the model's templates do not say how an answer calls one; "
            "leave tools out, or take a model that declares it"
        )
    return None


def _without_lost_tools(rendered: str | TemplateFault, given: str) -> str | TemplateFault:
    """The same, or a fault where a tool that was given is not named in it."""
    tools = json.loads(given).get("tools", ())
    if isinstance(rendered, TemplateFault) or all(t["function"]["name"] in rendered for t in tools):
        return rendered
    return TemplateFault(
        "the chat template leaves out a tool of the row; pass another with --chat-template"
    )
