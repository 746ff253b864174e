"""Control tokens, and text that only looks like one. Knows nothing about conversations.

A chat template writes control tokens (`<|im_start|>`); a message may contain the same characters.
Only the template's may steer the model. So those in a message are swapped for private characters
before the template runs, and afterwards the rendered text is cut at what the template wrote:

```
 message    "say <|im_end|>"
 hidden     "say ◆"                               ◆ stands for <|im_end|>
 rendered   <|im_start|>user\\nsay ◆<|im_end|>\\n
 pieces     [151644] "user\\nsay <|im_end|>" [151645] "\\n"      text pieces: never parsed
```
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from pipeline.prompts import Message

_PRIVATE = range(0xF0000, 0x10FFFE)  # code points that nobody may give a meaning


@dataclass(frozen=True, slots=True)
class HiddenMessages:
    """Messages without control-token strings, and what each private character stands for."""

    messages: list[Message]
    meaning: dict[int, str]


class ControlTokens:
    """The special tokens of a tokenizer, found in text by their spelling."""

    def __init__(self, backend: Tokenizer) -> None:
        special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._ids = {token.content: number for number, token in special.items()}
        self._strips_left = {token.content for token in special.values() if token.lstrip}
        self._strips_right = {token.content for token in special.values() if token.rstrip}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # A special token that is looked for in normalised text can hide behind another spelling.
        self._normalizer = (
            backend.normalizer if any(t.normalized for t in special.values()) else None
        )

    def first_in(self, text: str) -> str | None:
        """The first control-token string in `text`, as it is spelled."""
        found = self._pattern.search(text)
        return None if found is None or not found[0] else found[0]

    def occur_in(self, text: str) -> bool:
        """Whether a tokenizer that parses control tokens could find one in `text`."""
        if self._pattern.search(text):
            return True
        normalizer = self._normalizer
        return normalizer is not None and bool(self._pattern.search(normalizer.normalize_str(text)))

    def hide(self, messages: list[Message]) -> HiddenMessages:
        """Swap control-token strings in every field of every message for private characters.

        Raises ValueError if the messages use up the private characters themselves.
        """
        used = {ord(c) for m in messages for v in m.values() for c in v if ord(c) >= _PRIVATE[0]}
        free = (code for code in _PRIVATE if code not in used)
        code_of = dict(zip(self._ids, free, strict=False))
        if len(code_of) < len(self._ids):
            raise ValueError("the messages leave no private character free")
        hidden = [
            {
                field: self._pattern.sub(lambda match: chr(code_of[match[0]]), text)
                for field, text in message.items()
            }
            for message in messages
        ]
        return HiddenMessages(hidden, {code: content for content, code in code_of.items()})

    def split(self, rendered: str, meaning: dict[int, str]) -> Iterator[int | str]:
        """Cut rendered text at the control tokens in it: their ids, and the text between them.

        The strings that `hide` swapped out come back as text. Empty text is left out.
        """
        start, strip_left = 0, False
        for match in self._pattern.finditer(rendered):
            text = rendered[start : match.start()]
            text = text.lstrip() if strip_left else text
            text = text.rstrip() if match[0] in self._strips_left else text
            if text:
                yield text.translate(meaning)
            yield self._ids[match[0]]
            start, strip_left = match.end(), match[0] in self._strips_right
        text = rendered[start:].lstrip() if strip_left else rendered[start:]
        if text:
            yield text.translate(meaning)
