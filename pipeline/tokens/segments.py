"""Prompts in segments become token ids, each segment apart. Knows no files and no plan.

What a document becomes depends on nothing beside it, so that the same document is the same ids in
every prompt. What a tokenizer puts before every text stands in the preamble alone. A chat template
sees a mark where the documents go, and the rendering is cut there:

```
 messages    system  S   user  ◆Q
 rendered    <|start|>system S<|end|><|start|>user ◆Q<|end|><|start|>assistant
 segments    [------------- preamble ------------]  [------- question -------]
                                                  documents
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import is_row_fault
from pipeline.prompts import Message, SegmentedPrompt
from pipeline.tokens.chat_template import TemplateFault
from pipeline.tokens.control_tokens import ControlTokens
from pipeline.tokens.text_encoder import Overlong, TextEncoder

_MARKS = range(0xE000, 0xF8FF)
"""Code points that nobody may give a meaning; `ControlTokens` takes others."""

Ids = NDArray[np.uint32]
Piece = str | int


class SegmentFault(ValueError):
    """Why a row in segments has no ids: `error_type`, and a sentence without its text."""

    def __init__(self, message: str, error_type: str = "BadPrompt") -> None:
        super().__init__(message)
        self.error_type = error_type


RenderAll = Callable[[Sequence[list[Message]]], list[str | TemplateFault]]


class Chat(NamedTuple):
    """How conversations become text: `complete` adds what all of them begin with."""

    complete: Callable[[list[Message]], list[Message]]
    render_all: RenderAll


class Frame(NamedTuple):
    """What stands around the documents: token ids, and texts in which no control token is parsed;
    `parses`: in which they are."""

    before: Sequence[Piece]
    after: Sequence[Piece]
    parses: bool


@dataclass
class EncodedSegments:
    """By position in the batch: the ids of each segment, or what is wrong with the row."""

    ids: dict[int, list[Ids]] = field(default_factory=dict)
    faults: dict[int, SegmentFault] = field(default_factory=dict)
    overlong: dict[int, int] = field(default_factory=dict)


class SegmentEncoder:
    """`parses`: control tokens in the texts of rows are control tokens; `chat`: None
    where prompts are plain text."""

    def __init__(
        self, texts: TextEncoder, control: ControlTokens, parses: bool, chat: Chat | None
    ) -> None:
        self._texts = texts
        self._control = control
        self._parses = parses
        self._chat = chat

    def encode(
        self, prompts: Mapping[int, SegmentedPrompt], most_tokens: int | None
    ) -> EncodedSegments:
        """Rows that are sure to have more than `most_tokens` are only counted."""
        found = EncodedSegments()
        frames = self._frames(prompts, found)
        for row, frame in list(frames.items()):
            try:
                texts = [*prompts[row].documents, *(p for p in frame.before if isinstance(p, str))]
                texts += [piece for piece in frame.after if isinstance(piece, str)]
                self._texts.check_length(texts, most_tokens)
            except Overlong as error:
                found.overlong[row] = error.least
                del frames[row]
            except ValueError as error:
                found.faults[row] = SegmentFault(str(error))
                del frames[row]
        self._encode_rows({row: (frames[row], prompts[row].documents) for row in frames}, found)
        return found

    def _frames(
        self, prompts: Mapping[int, SegmentedPrompt], found: EncodedSegments
    ) -> dict[int, Frame]:
        if self._chat is not None:
            return self._frames_of_chats(self._chat, prompts, found)
        first, last = self._texts.around
        return {
            row: Frame([*first, prompt.preamble], [prompt.question, *last], self._parses)
            for row, prompt in prompts.items()
        }

    def _frames_of_chats(
        self, chat: Chat, prompts: Mapping[int, SegmentedPrompt], found: EncodedSegments
    ) -> dict[int, Frame]:
        """Of the rows whose documents have one place in the rendered conversation."""
        marks = {row: _free_mark(prompt) for row, prompt in prompts.items()}
        chats = {
            row: chat.complete(as_messages(prompt, marks[row])) for row, prompt in prompts.items()
        }
        hidden = {row: self._control.hide(c) for row, c in chats.items() if self._hides(c)}
        asked = [hidden[row].messages if row in hidden else chats[row] for row in chats]
        frames = {}
        for row, rendered in zip(chats, chat.render_all(asked), strict=True):
            try:
                before, after = _cut(rendered, marks[row])
            except SegmentFault as fault:
                found.faults[row] = fault
                continue
            if row in hidden:
                meaning = hidden[row].meaning
                parts = [list(self._control.split(text, meaning)) for text in (before, after)]
                frames[row] = Frame(parts[0], parts[1], False)
            else:
                frames[row] = Frame([before], [after], True)
        return frames

    def _hides(self, messages: list[Message]) -> bool:
        return not self._parses and any(
            self._control.occur_in(text) for message in messages for text in message.values()
        )

    def _encode_rows(
        self, rows: Mapping[int, tuple[Frame, Sequence[str]]], found: EncodedSegments
    ) -> None:
        """All rows together, each text once; only if that fails one by one, to find out which."""
        if not rows:
            return
        try:
            known = {
                parses: self._encode_distinct(
                    _texts_of(rows.values(), parses, self._parses), parses
                )
                for parses in (False, True)
            }
            for row, (frame, documents) in rows.items():
                around = known[frame.parses]
                segments = [
                    self._without_second_start(_join(frame.before, around), frame.parses),
                    *(known[self._parses][text] for text in documents),
                    _join(frame.after, around),
                ]
                fault = _find_empty(segments)
                if fault is None:
                    found.ids[row] = segments
                else:
                    found.faults[row] = fault
        except BaseException as error:
            if not is_row_fault(error):
                raise
            if len(rows) == 1:
                kind = type(error).__name__
                reason = SegmentFault(f"the prompt cannot be tokenised ({kind})")
                found.faults[next(iter(rows))] = reason
                return
            for row, parts in rows.items():
                self._encode_rows({row: parts}, found)

    def _encode_distinct(self, texts: Iterable[str], parses: bool) -> dict[str, Ids]:
        distinct = list(dict.fromkeys(texts))
        ids = self._texts.encode(distinct, parse_specials=parses, add_specials=False)
        arrays = (np.array(some, np.uint32) for some in ids)
        return dict(zip(distinct, arrays, strict=True))

    def _without_second_start(self, ids: Ids, parses: bool) -> Ids:
        """As for prompts in one piece: a preamble that begins with the token that is put before
        every text gets no second one."""
        first = self._texts.around[0]
        has_start = self._chat is None and parses and first
        is_twice = has_start and ids[:2].tolist() == [first[0]] * 2
        return ids[1:] if is_twice else ids


def as_messages(prompt: SegmentedPrompt, documents: str) -> list[Message]:
    """A conversation of the preamble, if there is one, and of the question behind `documents`."""
    user = {"role": "user", "content": documents + prompt.question}
    if not prompt.preamble:
        return [user]
    return [{"role": "system", "content": prompt.preamble}, user]


def _texts_of(
    rows: Iterable[tuple[Frame, Sequence[str]]], parses: bool, documents_parse: bool
) -> Iterable[str]:
    """The texts that are to be tokenised with control tokens, or without."""
    for frame, documents in rows:
        if frame.parses == parses:
            yield from (p for p in (*frame.before, *frame.after) if isinstance(p, str))
        if documents_parse == parses:
            yield from documents


def _join(pieces: Sequence[Piece], known: Mapping[str, Ids]) -> Ids:
    arrays = [
        np.array([piece], np.uint32) if isinstance(piece, int) else known[piece] for piece in pieces
    ]
    return np.concatenate([np.zeros(0, np.uint32), *arrays])


def _find_empty(segments: Sequence[Ids]) -> SegmentFault | None:
    """Says which document, or the question, has no token; a preamble may have none."""
    for number, ids in enumerate(segments[1:]):
        if not len(ids):
            what = "the question" if number == len(segments) - 2 else f"document {number}"
            return SegmentFault(f"the tokenizer makes no token of {what}")
    return None


def _free_mark(prompt: SegmentedPrompt) -> str:
    used = {*prompt.preamble, *prompt.question}
    return next(mark for code in _MARKS if (mark := chr(code)) not in used)


def _cut(rendered: str | TemplateFault, mark: str) -> tuple[str, str]:
    """Raises SegmentFault."""
    if isinstance(rendered, TemplateFault):
        raise SegmentFault(str(rendered), "BadTemplate")
    times = rendered.count(mark)
    if times != 1:
        said = (
            "leaves out the place of the documents"
            if not times
            else (f"writes the place of the documents {times} times")
        )
        raise SegmentFault(
            f"the chat template {said}; pass another template with --chat-template", "BadTemplate"
        )
    before, _, after = rendered.partition(mark)
    return before, after
