"""Contexts and continuations become token ids, as lm-evaluation-harness has it.

```
 context "Answer: "  continuation "yes"      blanks at the end of a context go to the continuation
 context "Answer:"   continuation " yes"
 tokens of both together      [Answer][:][ yes]
 of the context alone         [Answer][:]          what stands behind as many is the continuation
```

An empty context becomes the token that texts of the model begin with, or else end with. A
conversation is rendered up to where its answer begins, and what it ends with stays where it is: the
choice follows what a generated answer would follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.prompts import Message, ScoredPrompt
from pipeline.tokens.chat_template import TemplateFault
from pipeline.tokens.control_tokens import ControlTokens
from pipeline.tokens.segments import Chat
from pipeline.tokens.text_encoder import Overlong, TextEncoder
from pipeline.tokens.words import last_between_words

Ids = NDArray[np.uint32]
_LETTERS_AT_A_TIME = 4_000_000
_END_LETTERS = 64


class Pair(NamedTuple):
    """A request: at least one token of each but of what nothing can be said. `num_bytes`: of the
    continuation's text."""

    context: Ids
    continuation: Ids
    num_bytes: int


class PairFault(ValueError):
    """Why a row cannot be scored: `error_type`, and a sentence without its text."""

    def __init__(self, message: str, error_type: str = "BadPrompt") -> None:
        super().__init__(message)
        self.error_type = error_type

    def about(self, question: str) -> PairFault:
        """The same, where one of several questions is at fault."""
        if not question:
            return self
        return PairFault(f"the question {question!r}: {self}", self.error_type)


@dataclass
class EncodedPairs:
    """By position in the batch: the requests of each row, or what is wrong with it. `overlong`:
    tokens that a context has at least, which was not tokenised."""

    pairs: dict[int, list[Pair]] = field(default_factory=dict)
    faults: dict[int, PairFault] = field(default_factory=dict)
    overlong: dict[int, int] = field(default_factory=dict)


class _Text(NamedTuple):
    """Of a row, what its context is: token ids of control tokens, and texts; `parses`: in which
    control tokens are parsed; `begins`: the tokenizer's own first tokens belong before it."""

    pieces: Sequence[str | int]
    parses: bool
    begins: bool


class PairEncoder:
    """`parses`: control tokens in the texts of rows are control tokens; `first_id`: what an empty
    context becomes; `chat`: None where the model has no template."""

    def __init__(
        self,
        texts: TextEncoder,
        control: ControlTokens,
        parses: bool,
        first_id: int | None,
        chat: Chat | None,
    ) -> None:
        self._texts = texts
        self._control = control
        self._parses = parses
        self._first_id = first_id
        self._chat = chat
        self._splits = texts.splits_words

    def encode(
        self, prompts: dict[int, ScoredPrompt], is_chat: bool, most_tokens: int | None
    ) -> EncodedPairs:
        """The requests of each row; of one without continuations, whose prompt is scored itself,
        all of it behind one token. `is_chat`: contexts are put into the template.
        `most_tokens`: contexts that are sure to have more are not tokenised."""
        found = EncodedPairs()
        contexts = self._rendered(prompts, found) if is_chat else self._plain(prompts)
        for row, (text, blanks) in contexts.items():
            try:
                found.pairs[row] = self._row(text, blanks, prompts[row], most_tokens)
            except Overlong as error:
                found.overlong[row] = error.least
            except PairFault as fault:
                found.faults[row] = fault
        return found

    def _plain(self, prompts: dict[int, ScoredPrompt]) -> dict[int, tuple[_Text, str]]:
        """Contexts, and the blanks that go from their ends to the continuations."""
        found = {}
        for row, prompt in prompts.items():
            assert isinstance(prompt.context, str)
            context = prompt.context.rstrip() if prompt.continuations else prompt.context
            blanks = prompt.context[len(context) :]
            found[row] = _Text([context], self._parses, begins=True), blanks
        return found

    def _rendered(
        self, prompts: dict[int, ScoredPrompt], found: EncodedPairs
    ) -> dict[int, tuple[_Text, str]]:
        assert self._chat is not None
        chats: dict[int, list[Message]] = {}
        for row, prompt in prompts.items():
            context = prompt.context
            messages = (
                [{"role": "user", "content": context}] if isinstance(context, str) else context
            )
            chats[row] = self._chat.complete(messages)
        hidden = {row: self._control.hide(c) for row, c in chats.items() if self._hides(c)}
        asked = [hidden[row].messages if row in hidden else chats[row] for row in chats]
        texts = {}
        for row, rendered in zip(chats, self._chat.render_all(asked), strict=True):
            if isinstance(rendered, TemplateFault):
                found.faults[row] = PairFault(str(rendered), rendered.error_type or "BadPrompt")
            elif row in hidden:
                pieces = list(self._control.split(rendered, hidden[row].meaning))
                texts[row] = _Text(pieces, False, begins=False), ""
            else:
                texts[row] = _Text([rendered], True, begins=False), ""
        return texts

    def _hides(self, messages: list[Message]) -> bool:
        return not self._parses and any(
            self._control.occur_in(text) for message in messages for text in message.values()
        )

    def _row(
        self, text: _Text, blanks: str, prompt: ScoredPrompt, most_tokens: int | None
    ) -> list[Pair]:
        if not prompt.continuations:
            return [self._itself(text)]
        self._check([p for p in text.pieces if isinstance(p, str)], most_tokens)
        context, before = self._ids(text), 0
        if text.pieces == [""] or not len(context):
            context = context if len(context) else self._first()
            text = _Text([], text.parses, begins=False)
        else:
            before = len(context)
        text, before = self._end_of(text, context) or (text, before)
        said = [blanks + continuation for continuation in prompt.continuations]
        sizes = [len(text.encode()) for text in said]
        # Copies: a view would keep the context once for each choice.
        tails = [ids[before:].copy() for ids in self._wholes(text, said)]
        for number, tail in enumerate(tails):
            if not len(tail):
                which = f"choice {number}" if len(tails) > 1 else "the continuation"
                raise PairFault(
                    f"{which} makes no token of its own behind the context; begin it with a blank, "
                    "or end the context otherwise",
                    "EmptyContinuation",
                )
        return [Pair(context, *pair) for pair in zip(tails, sizes, strict=True)]

    def _end_of(self, text: _Text, context: Ids) -> tuple[_Text, int] | None:
        """The end of a long context from between two words on, and its tokens, where these are the
        last ones of the context: then what follows is tokenised behind it as behind the whole, and
        the rest of the context is not tokenised again with every choice. None: the whole is needed.
        """
        last = text.pieces[-1] if text.pieces else 0
        if isinstance(last, int):
            return None
        start = 0  # pieces are tokenised apart
        if len(text.pieces) == 1:
            start = last_between_words(last, len(last) - _END_LETTERS)
            if not start or not self._splits:
                return None
        end = _Text([last[start:]], text.parses, begins=False)
        ids = self._ids(end)
        is_end = 0 < len(ids) < len(context) and np.array_equal(context[-len(ids) :], ids)
        return (end, len(ids)) if is_end else None

    def _itself(self, text: _Text) -> Pair:
        texts = [piece for piece in text.pieces if isinstance(piece, str)]
        self._check(texts, None)
        ids = self._ids(text)
        starts = [self._first_id, *self._texts.around[0][:1]]
        is_begun = len(ids) > 1 and int(ids[0]) in starts
        context = ids[:1] if is_begun else self._first()
        rest = ids[1:] if is_begun else ids
        if not len(rest):
            raise PairFault("the tokenizer makes no token of this prompt")
        return Pair(context, rest, sum(len(text.encode()) for text in texts))

    def _first(self) -> Ids:
        if self._first_id is None:
            raise PairFault(
                "the context is empty, and the model has no token that texts begin or end with "
                "(BOS, EOS); give the row a context",
                "NoFirstToken",
            )
        return np.array([self._first_id], np.uint32)

    def _behind(self, text: _Text, said: str) -> _Text:
        """A context and what follows it. Of what the row says no control token is parsed unless it
        may be, also where the template's are."""
        pieces = list(text.pieces)
        if text.parses and not self._parses and self._control.occur_in(said):
            pieces = list(self._control.split("".join(map(str, pieces)), {}))
            text = text._replace(parses=False)
        if pieces and isinstance(pieces[-1], str):
            return text._replace(pieces=[*pieces[:-1], pieces[-1] + said])
        return text._replace(pieces=[*pieces, said])

    def _wholes(self, text: _Text, said: Sequence[str]) -> Iterator[Ids]:
        """Some letters at a time: all together would be the context once for each choice."""
        letters = sum(len(piece) for piece in text.pieces if isinstance(piece, str))
        low = 0
        while low < len(said):
            high, left = low + 1, _LETTERS_AT_A_TIME - letters - len(said[low])
            while high < len(said) and (left := left - letters - len(said[high])) >= 0:
                high += 1
            some = [self._behind(text, continuation) for continuation in said[low:high]]
            if all(len(whole.pieces) == 1 and whole.parses == text.parses for whole in some):
                yield from self._encode([str(whole.pieces[0]) for whole in some], text)
            else:
                yield from map(self._ids, some)
            low = high

    def _ids(self, text: _Text) -> Ids:
        if len(text.pieces) == 1 and isinstance(text.pieces[0], str):
            (ids,) = self._encode([text.pieces[0]], text)
            return ids
        self._check([piece for piece in text.pieces if isinstance(piece, str)], None)
        return np.array(self._texts.encode_pieces(text.pieces, None), np.uint32)

    def _encode(self, wholes: list[str], like: _Text) -> Iterator[Ids]:
        for whole in wholes:
            self._check([whole], None)
        encoded = self._texts.encode(wholes, parse_specials=like.parses, add_specials=like.begins)
        for ids in encoded:
            yield np.array(self._without_end(ids) if like.begins else ids, np.uint32)

    def _check(self, texts: Sequence[str], most_tokens: int | None) -> None:
        """Raises Overlong, or PairFault for what takes gigabytes to tokenise."""
        try:
            self._texts.check_length(texts, most_tokens)
        except ValueError as error:
            raise PairFault(str(error)) from None

    def _without_end(self, ids: list[int]) -> list[int]:
        """What a tokenizer puts behind every text would stand between context and continuation."""
        end = self._texts.around[1]
        return ids[: -len(end)] if end and ids[-len(end) :] == end else ids
