"""Where a text can be cut so that its pieces become the tokens of the whole: between two words.

A tokenizer that splits texts into words goes through them from the left and makes tokens of each
word by itself. So where a word begins depends on nothing that comes later, and pieces that are cut
before the blank between two words give the tokens of the whole.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import models

_BETWEEN = re.compile(r"[A-Za-z] (?=[A-Za-z])")
_LOOKED_BACK = 400  # letters, for a place between two words
_OF_WORDS = (models.BPE, models.WordLevel, models.WordPiece)


def splits_words(backend: Any) -> bool:
    """Whether a tokenizer splits texts from left to right before each piece becomes tokens by
    itself."""
    splitter = backend.pre_tokenizer
    if splitter is None or not isinstance(backend.model, _OF_WORDS):
        return False
    return len(splitter.pre_tokenize_str("one two three")) >= 3


def makes_tokens_of_words(backend: Any) -> bool:
    """Whether it does, and no token of its own reaches from one word to the next."""
    added = backend.get_added_tokens_decoder().values()
    if any(t.lstrip or t.rstrip or _BETWEEN.search(t.content) for t in added):
        return False
    return splits_words(backend)


def last_between_words(text: str, end: int) -> int:
    """Where the last blank between two words lies of which all is before `end`; 0: there is none
    that is near."""
    found = _BETWEEN.finditer(text, max(0, end - _LOOKED_BACK), max(0, end))
    return max((place.start() + 1 for place in found), default=0)
