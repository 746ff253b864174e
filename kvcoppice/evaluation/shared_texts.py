"""Tokenises texts that begin alike, each beginning once: a context is there once for each choice,
and the examples before it once for each document.

```
 sorted  "… words that are the same| question one| A"        cut between two words, where the
         "… words that are the same| question one| B"        text before had the same until then
         "… words that are the same| question two| A"        each piece becomes tokens once
```

For tokenizers that do not make tokens of words (`pipeline/tokens/words.py`) nothing is cut; and
some of the texts are tokenised in one piece as well, to see that it is so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.tokens.words import last_between_words

Tokens = NDArray[np.uint32]
Encode = Callable[[list[str]], list[Tokens]]
"""Ids of each text, without special tokens."""

_LEAST_PIECE = 40  # letters; less is not worth a cut
_ALL_COMPARED, _THEN_EVERY = 20, 100


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
        place = last_between_words(text, same)
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
