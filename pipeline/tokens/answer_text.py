"""Generated token ids become text, and text ends at a stop string. Knows nothing about prompts'
making.

An answer is text that goes on from its prompt: a decoder that drops the first space of a text must
see the end of the prompt before it. A stop string is looked for in all that was generated, control
tokens included, and may begin in the prompt, as `generate(stop_strings=)` has it:

```
 prompt ... "Q: 2+2\\nA:"                    answer  " 4\\n\\nQ: ..."        stop "\\n\\nQ"
 raw text        "A: 4\\n\\nQ"    stop found at 4     visible text  " 4"
```
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_TAIL_TOKENS = 8  # of a prompt, which decide how the text goes on

Ids = Sequence[int] | NDArray[np.unsignedinteger]


class Shown(NamedTuple):
    """What a text holds besides: special tokens, and the stop string that ended it."""

    special: bool = False
    stop: bool = False


_AS_USUAL = Shown()


class AnswerText:
    """The text of answers, by one tokenizer. Can be sent to another process."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoder = backend.get_added_tokens_decoder()
        self._special = {number for number, token in decoder.items() if token.special}

    def decode(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], stops: Sequence[tuple[str, ...]]
    ) -> list[str]:
        """The text of each answer up to its first stop string, special tokens left out."""
        texts = self._visible(prompts, answers)
        return [
            self._cut(prompt, answer, stop, text) if stop else text
            for prompt, answer, stop, text in zip(prompts, answers, stops, texts, strict=True)
        ]

    def decode_one(
        self, prompt: Ids, answer: Ids, stop: tuple[str, ...] = (), how: Shown = _AS_USUAL
    ) -> str:
        """The text of one answer, shown in another way than `decode` does."""
        (text,) = self._visible([prompt], [answer], how.special)
        return self._cut(prompt, answer, stop, text, how) if stop else text

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds: of a text that it begins, some decoders drop a blank."""
        alone = self._decode_batch([[token] for token in token_ids], special=True)
        twice = self._decode_batch([[token, token] for token in token_ids], special=True)
        return [
            both.removeprefix(one) if both.startswith(one) else one
            for one, both in zip(alone, twice, strict=True)
        ]

    def is_stopped(self, token_ids: Ids, stop: tuple[str, ...], prompt: Ids = ()) -> bool:
        """Whether a stop string ends in the text of these ids, which follow `prompt`."""
        if not stop:
            return False
        raw = self._raw(prompt, token_ids, stop)
        return any(end in raw for end in stop) and self._find(prompt, token_ids, stop) is not None

    def tail(self, prompt: Ids, stop: tuple[str, ...]) -> tuple[int, ...]:
        """As much of a prompt as decides where one of these ends in what follows it."""
        return tuple(_last(prompt, max(_TAIL_TOKENS, _longest(stop))))

    def has_just_stopped(
        self, token_ids: Sequence[int], stop: tuple[str, ...], prompt: Ids = ()
    ) -> bool:
        """As `is_stopped`, of ids that were asked for one by one: only the last ones are read."""
        most = _longest(stop) + _TAIL_TOKENS
        if len(token_ids) < most:
            return self.is_stopped(token_ids, stop, prompt)
        text = self._backend.decode(list(token_ids[-most:]), skip_special_tokens=False)
        return any(end in text for end in stop)

    def _visible(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], special: bool = False
    ) -> list[str]:
        tails = [_last(prompt, _TAIL_TOKENS) for prompt in prompts]
        before = self._decode_batch(tails, special)
        for row, prompt in enumerate(prompts):
            while not before[row] and len(tails[row]) < len(prompt):  # nothing but control tokens
                tails[row] = _last(prompt, 4 * len(tails[row]))
                before[row] = self._decode_batch([tails[row]], special)[0]
        whole = self._decode_batch(
            [[*tail, *answer] for tail, answer in zip(tails, answers, strict=True)], special
        )
        return [_after(start, text) for start, text in zip(before, whole, strict=True)]

    def _cut(
        self, prompt: Ids, answer: Ids, stop: tuple[str, ...], text: str, how: Shown = _AS_USUAL
    ) -> str:
        """`text` up to the stop string, where there is one, or with it: whole tokens, and the
        beginning of the one in which that place lies."""
        found = self._find(prompt, answer, stop)
        if found is None:
            return text
        start = found[1] if how.stop else found[0]
        num, before = len(answer), self._raw(prompt, answer, stop)
        while num and len(before) > start:
            num -= 1
            before = self._raw(prompt, answer[:num], stop)
        (whole,) = self._visible([prompt], [answer[:num]], how.special)
        is_hidden = num < len(answer) and answer[num] in self._special and not how.special
        if len(before) > start or num == len(answer) or is_hidden:
            return whole
        return whole + self._raw(prompt, answer, stop)[len(before) : start]

    def _find(self, prompt: Ids, answer: Ids, stop: tuple[str, ...]) -> tuple[int, int] | None:
        """Where in the raw text the first stop string that ends in the answer begins and ends."""
        if not len(answer):
            return None
        raw, own = self._raw(prompt, answer, stop), len(self._raw(prompt, (), stop))
        found = ((raw.find(text, max(0, own - len(text) + 1)), len(text)) for text in stop)
        return min(((at, at + length) for at, length in found if at >= 0), default=None)

    def _raw(self, prompt: Ids, answer: Ids, stop: tuple[str, ...]) -> str:
        """The end of the prompt, as long as the longest stop string, and the answer."""
        ids = [*self.tail(prompt, stop), *answer]
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _decode_batch(self, rows: Sequence[Ids], special: bool) -> list[str]:
        texts: list[str] = self._backend.decode_batch(
            [list(ids) for ids in rows], skip_special_tokens=not special
        )
        return texts


@lru_cache
def _longest(stop: tuple[str, ...]) -> int:
    """Bytes of the longest one, and so the most tokens that spell it."""
    return max(len(text.encode(errors="replace")) for text in stop)


def _last(prompt: Ids, most: int) -> list[int]:
    tail = prompt[max(0, len(prompt) - most) :]
    return tail.tolist() if isinstance(tail, np.ndarray) else list(tail)


def _after(start: str, text: str) -> str:
    """What `text` adds to `start`; they part a little earlier where a character was incomplete."""
    return text[len(start if text.startswith(start) else commonprefix([start, text])) :]
