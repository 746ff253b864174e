"""Tokenises texts that begin alike, each beginning once: a context is there once for each choice,
and the examples before it once for each document.

```
 sorted  "… words that are the same| question one| A"        cut between two words, where the
         "… words that are the same| question one| B"        text before had the same until then
         "… words that are the same| question two| A"        each piece becomes tokens once
```

A tokenizer that splits texts into words goes through them from the left and makes tokens of each
word by itself, so pieces cut before the blank between two words give the tokens of the whole. For
other tokenizers nothing is cut; and some of the texts are tokenised in one piece as well, to see
that it is so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

Tokens = NDArray[np.uint32]
Encode = Callable[[list[str]], list[Tokens]]
"""Ids of each text, without special tokens."""

_BETWEEN_WORDS = re.compile(r"[A-Za-z] (?=[A-Za-z])")
_LOOKED_BACK = 400  # letters, for a place between two words
_LEAST_PIECE = 40  # letters; less is not worth a cut
_OF_WORDS = (models.BPE, models.WordLevel, models.WordPiece)
_ALL_COMPARED, _THEN_EVERY = 20, 100


def makes_tokens_of_words(backend: Any) -> bool:
    """Whether a tokenizer splits texts into words from the left, and no token of its own reaches
    from one word to the next."""
    splitter = backend.pre_tokenizer
    if splitter is None or not isinstance(backend.model, _OF_WORDS):
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(t.lstrip or t.rstrip or _BETWEEN_WORDS.search(t.content) for t in added):
        return False
    return len(splitter.pre_tokenize_str("one two three")) >= 3


class DifferentTokens(Exception):
    """Pieces gave other tokens than the whole."""


def encode_shared(texts: Iterable[str], encode: Encode) -> dict[str, Tokens]:
    """The ids of each text. Raises DifferentTokens."""
    pieces_of = dict(_cut_all(sorted(set(texts))))
    known = list(dict.fromkeys(piece for pieces in pieces_of.values() for piece in pieces))
    ids = dict(zip(known, encode(known), strict=True))
    found = {
        text: ids[pieces[0]] if len(pieces) == 1 else np.concatenate([ids[p] for p in pieces])
        for text, pieces in pieces_of.items()
    }
    cut = [text for text, pieces in pieces_of.items() if len(pieces) > 1]
    compared = [*cut[:_ALL_COMPARED], *cut[_ALL_COMPARED::_THEN_EVERY]]
    for text, whole in zip(compared, encode(compared), strict=True):
        if not np.array_equal(found[text], whole):
            raise DifferentTokens
    return found


def _cut_all(texts: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each of the sorted texts, and its pieces."""
    cuts: list[int] = []
    before = ""
    for text in texts:
        same = _common(before, text)
        while cuts and cuts[-1] >= same:
            cuts.pop()
        place = _last_between_words(text, same)
        if place - (cuts[-1] if cuts else 0) >= _LEAST_PIECE:
            cuts.append(place)
        edges = [0, *cuts, len(text)]
        yield text, [text[low:high] for low, high in zip(edges, edges[1:], strict=False)]
        before = text


def _common(left: str, right: str) -> int:
    """Letters at which both begin alike."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _last_between_words(text: str, end: int) -> int:
    """Where the last blank between two words lies of which all is before `end`; 0: there is none
    that is near."""
    found = _BETWEEN_WORDS.finditer(text, max(0, end - _LOOKED_BACK), end)
    return max((place.start() + 1 for place in found), default=0)
