"""What a turn adds to a conversation, as text: what a template writes behind the answer before.

Answers are not known, and never tokenised: the ids that a model generated stand where a template
would write their text. So a turn is rendered behind a stand-in for all that was said before it, and
what stands behind the answer there is what it adds:

```
 opening     system S   user ?                            <system>S <user>? <assistant>
 turn        system S   user ?   assistant !   user hi    <system>S <user>? <assistant>! <user>hi ..
 added                                                                                  [----------]
```

So a turn costs the rendering of a few messages, however many came before. That is sound where a
template is *local*: what it writes for a turn depends on nothing said before, and never changes
afterwards. `LaterTurns.check` tries that out with conversations of up to 64 turns before a row is
read, with answers that think (`<think>`) and others; each turn's own rendering must begin with that
of its opening; and a system message of a row's own must leave later turns as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.prompts import Message, TurnPrompt
from pipeline.tokens.chat_template import TemplateFault
from pipeline.tokens.segments import Chat

Ids = Sequence[int] | NDArray[np.uint32]
_QUESTIONS = [chr(0xE100 + turn) for turn in range(64)]  # private: words of no language
_ANSWERS = [chr(0xE200 + turn) for turn in range(64)]
_QUESTION: Message = {"role": "user", "content": _QUESTIONS[0]}
_ANSWER: Message = {"role": "assistant", "content": _ANSWERS[0]}
_THOUGHT = "<think>\n\ue000\n</think>\n\n"
_TURNS = (1, 2, 3, 4, 8, 64)  # of the conversations that are tried out
_KNOWN_SYSTEMS = 1000  # system messages that are remembered
_REMEDY = "pass another template with --chat-template"
_REWRITES = (
    "the chat template writes the turns of a conversation otherwise once more turns follow, so "
    f"none can go on from the KV of the turns before it; {_REMEDY}"
)
_FORGETS = (
    "the chat template leaves out what earlier answers thought (<think>), so no turn can go on "
    f"from the KV of the turns before it; {_REMEDY}"
)
_OWN_SYSTEM = (
    "under the system message of this conversation the chat template writes later turns otherwise; "
    "name it with --system-prompt, in a job of its own"
)
_LATE_SYSTEM = (
    "a later turn of a conversation holds a system message; put it into the first turn, or name it "
    "with --system-prompt"
)


class TurnFault(TemplateFault):
    """Why nothing is known of what a turn adds."""

    def __init__(self, message: str, error_type: str = "TemplateRewritesHistory") -> None:
        super().__init__(message, error_type)


class LaterTurns:
    """What later turns add by a template; `chat.complete` adds what conversations begin with."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._opening = chat.complete([_QUESTION])

    def behind(self, content: str | list[Message]) -> list[Message]:
        """A conversation that ends with this turn. Raises TurnFault."""
        said = _as_messages(content)
        if any(message["role"] == "system" for message in said):
            raise TurnFault(_LATE_SYSTEM, "BadMessages")
        return [*self._opening, _ANSWER, *said]

    def render(self, conversations: Sequence[list[Message]]) -> list[str | TemplateFault]:
        """What the last turns of conversations as `behind` makes them add, hidden or not."""
        return self._render(conversations, len(self._opening))

    def _render(
        self, conversations: Sequence[list[Message]], num_before: int
    ) -> list[str | TemplateFault]:
        openings = {_key(chat[:num_before]): chat[:num_before] for chat in conversations}
        rendered = self._chat.render_all([*openings.values(), *conversations])
        of_opening = dict(zip(openings, rendered, strict=False))
        return [
            _behind(of_opening[_key(chat[:num_before])], text)
            for chat, text in zip(conversations, rendered[len(openings) :], strict=True)
        ]

    def is_same_under(self, system: Message) -> bool:
        """Whether later turns are written under this system message as under that of the job."""
        opening = [system, _QUESTION]
        own, usual = (
            self._render([[*start, _ANSWER, _QUESTION]], len(start))[0]
            for start in (opening, self._opening)
        )
        return own == usual or (isinstance(own, TemplateFault) and str(own) == str(usual))

    def check(self) -> None:
        """Raises UsageError where no conversation could go on from the KV of its last turn."""
        reason = self._why_not_local()
        if reason is not None:
            raise UsageError(reason)

    def check_conversation(self, turns: Sequence[TurnPrompt]) -> None:
        """Raises UsageError where this conversation, its answers standing in, is written otherwise
        than as its first prompt and what its later turns add.

        One that the template refuses, or a turn of which it does, says nothing.
        """
        first, *said = (_as_messages(turn.content) for turn in turns)
        first = self._chat.complete(first)
        behind = [[*self._opening, _ANSWER, *messages] for messages in said]
        conversation = [*first, *(m for messages in said for m in (_ANSWER, *messages))]
        texts = [*self._chat.render_all([conversation, first]), *self.render(behind)]
        if any(isinstance(text, TemplateFault) for text in texts):
            return
        left, *added = map(str, texts)
        for text in added:
            if not left.startswith(text):
                raise UsageError(_REWRITES)
            left = left[len(text) :].lstrip().removeprefix(_ANSWERS[0])

    def _why_not_local(self) -> str | None:
        """One sentence why no conversation can go on from the KV of its last turn, or None."""
        for thought, reason in (("", _REWRITES), (_THOUGHT, _FORGETS)):
            chats = [[*self._opening, *_dialogue(turns, thought)] for turns in _TURNS]
            first, *others = self._chat.render_all(chats)
            if isinstance(first, TemplateFault):
                return None  # rows may be unlike it, and say themselves what is wrong
            if isinstance(others[0], TemplateFault):
                return f"{others[0]}, so no second turn can be asked; {_REMEDY}"
            added = [
                _additions(first, text, thought, turns)
                for turns, text in zip(_TURNS[1:], others, strict=True)
            ]
            if None in added or len({piece for pieces in added for piece in pieces or ()}) != 1:
                return reason
        return None


class SystemMessages:
    """How long system messages are. `encode`: the ids of a conversation, none where it has none."""

    def __init__(
        self, turns: LaterTurns, encode: Callable[[list[Message]], NDArray[np.uint32]]
    ) -> None:
        self._turns = turns
        self._encode = encode
        self._known: dict[str, NDArray[np.uint32] | None] = {}

    def count(self, messages: list[Message], prompt: Ids) -> int:
        """As many first ids of the prompt of a first turn are its system message's.

        Raises TurnFault where later turns cannot follow it.
        """
        if messages[0]["role"] != "system":
            return 0
        alone = self._find(messages[0])
        if alone is None:
            raise TurnFault(_OWN_SYSTEM)
        most = min(len(alone), len(prompt))
        differs = alone[:most] != np.asarray(prompt[:most], np.uint32)
        return int(np.argmax(differs)) if differs.any() else most

    def _find(self, message: Message) -> NDArray[np.uint32] | None:
        """The ids of a system message alone; None: it changes later turns."""
        text = message["content"]
        if text not in self._known:
            if len(self._known) >= _KNOWN_SYSTEMS:
                self._known.clear()
            self._known[text] = self._read(message)
        return self._known[text]

    def _read(self, message: Message) -> NDArray[np.uint32] | None:
        if not self._turns.is_same_under(message):
            return None
        alone = self._encode([message])
        return alone if len(alone) else self._encode([message, _QUESTION])


def _dialogue(turns: int, thought: str) -> list[Message]:
    """What follows the first question of a conversation of so many turns, each unlike others."""
    return [
        said
        for turn in range(1, turns)
        for said in (
            {"role": "assistant", "content": thought + _ANSWERS[turn]},
            {"role": "user", "content": _QUESTIONS[turn]},
        )
    ]


def _additions(first: str, text: str | TemplateFault, thought: str, turns: int) -> list[str] | None:
    """What stands in `text` behind each answer, without white space at its end and as if all asked
    the same; None where it does not begin with `first`, or an answer is not in its place."""
    if isinstance(text, TemplateFault) or not text.startswith(first):
        return None
    added, rest = [], text[len(first) :]
    for turn in range(1, turns):
        before, answer, rest = rest.partition(thought + _ANSWERS[turn])
        if not answer:
            return None
        added.append(before)
    before, *added = [*added, rest]
    asked = [piece.count(_QUESTIONS[turn]) for turn, piece in enumerate(added, 1)]
    if before.strip() or asked != [1] * len(asked):
        return None
    return [
        piece.replace(_QUESTIONS[turn], _QUESTIONS[0]).rstrip()
        for turn, piece in enumerate(added, 1)
    ]


def _behind(opening: str | TemplateFault, text: str | TemplateFault) -> str | TemplateFault:
    """White space before an answer is the model's own to generate."""
    if isinstance(text, TemplateFault) or isinstance(opening, TemplateFault):
        return text if isinstance(text, TemplateFault) else opening
    rest = text[len(opening) :].lstrip()
    if not text.startswith(opening) or not rest.startswith(_ANSWERS[0]):
        return TurnFault(
            "with this turn the chat template writes what came before it otherwise, so it cannot "
            f"go on from the KV of the turns before; {_REMEDY}"
        )
    return rest[len(_ANSWERS[0]) :]


def _as_messages(content: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _key(messages: Sequence[Message]) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple(message.items()) for message in messages)
