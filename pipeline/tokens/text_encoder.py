"""Texts become token ids, one by one. Knows no conversations, templates or settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from pipeline.tokens.coverage import most_characters
from pipeline.tokens.growth import growth_of
from pipeline.tokens.words import splits_words

_MOST_LETTERS = 32_000_000
"""Of a row that is tokenised, as its tokenizer may lengthen it; each takes some hundred bytes."""
_LETTERS_AT_A_TIME = 4_000_000


class Overlong(Exception):
    """A row is sure to have more tokens than asked for, so many at least."""

    def __init__(self, least: int) -> None:
        self.least = least


class TextEncoder:
    """The backend of a tokenizer. For one thread at a time."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._most_characters = most_characters(backend)
        self._growth = growth_of(backend)

    def encode(
        self, texts: list[str], *, parse_specials: bool, add_specials: bool
    ) -> list[list[int]]:
        """A text that begins with the token that is put before every text gets no second one."""
        self._backend.encode_special_tokens = not parse_specials
        rows = [
            encoding.ids
            for some in _portions(texts, int(_LETTERS_AT_A_TIME / self._growth))
            for encoding in self._backend.encode_batch_fast(some, add_special_tokens=add_specials)
        ]
        if parse_specials and add_specials:
            added = self._added_at_start
            return [ids[1:] if ids[:2] == [added, added] else ids for ids in rows]
        return rows

    def encode_pieces(self, pieces: Sequence[str | int], most_tokens: int | None) -> list[int]:
        """Token ids, and texts in which no control token is parsed, as `ControlTokens.split` has
        them. Raises as `check_length`."""
        texts = [piece for piece in pieces if isinstance(piece, str)]
        self.check_length(texts, most_tokens)
        encoded = iter(self.encode(texts, parse_specials=False, add_specials=False))
        return [
            number
            for piece in pieces
            for number in ([piece] if isinstance(piece, int) else next(encoded))
        ]

    def check_length(self, texts: Sequence[str], most_tokens: int | None) -> None:
        """Raises Overlong if these texts are sure to have more tokens together, ValueError if it
        takes gigabytes to find out."""
        if most_tokens is not None and self._most_characters is not None:
            least = -(-sum(map(len, texts)) // self._most_characters)
            if least > most_tokens:
                raise Overlong(least)
        letters = sum(map(len, texts))
        if letters * self._growth > _MOST_LETTERS:
            raise ValueError(f"the prompt of {letters:,} characters is too long to be tokenised")

    @cached_property
    def splits_words(self) -> bool:
        """Whether texts are split from left to right before each piece becomes tokens by itself."""
        return splits_words(self._backend)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before every text, and after it."""
        bare, whole = (
            self._backend.encode("a", add_special_tokens=added).ids for added in (False, True)
        )
        starts = range(len(whole) - len(bare) + 1)
        at = next((start for start in starts if whole[start : start + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    @cached_property
    def _added_at_start(self) -> int | None:
        ids = self._backend.encode("", add_special_tokens=True).ids
        return ids[0] if ids else None


def _portions(texts: list[str], most_letters: int) -> Iterator[list[str]]:
    """The texts in order, so many letters at a time, or one text."""
    start = letters = 0
    for stop, text in enumerate(texts):
        letters += len(text)
        if letters > most_letters and stop > start:
            yield texts[start:stop]
            start, letters = stop, len(text)
    yield texts[start:]
