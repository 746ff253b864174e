"""How much longer a tokenizer's own steps may make a text, known before a text is met.

```
 text ─► normalizer ─► pre-tokenizer ─► model ─► post-processor      token ids ─► decoder ─► text
         Replace: a ─► aaaaaaaaaa, ten times over                                 Replace, too
```
A few lines of tokenizer.json can ask for a text ten thousand million times as long.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

MOST_GROWTH = 1000.0
"""Above this it is no tokenizer's."""


def growth_of(backend: Tokenizer) -> float:
    """Characters that one of a text may become by the contents that steps put in; at least 1.

    What Unicode itself makes longer is left out: it is never much.
    """
    encoding = _growth(steps_of(backend.normalizer)) * _growth(steps_of(backend.pre_tokenizer))
    decoding = _growth(steps_of(backend.decoder))
    return max(encoding * _copies(steps_of(backend.post_processor)), decoding)


def steps_of(component: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, as tokenizer.json has
    them."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    (steps,) = (value for value in part.values() if isinstance(value, list))
    return [inner for step in steps for inner in _flat(step)]


def _growth(steps: list[dict[str, Any]]) -> float:
    """Backwards: what a character comes to from a step on, `other` being any without a name."""
    other = 1.0
    of: dict[str, float] = {}
    for step in reversed(steps):
        if step["type"] != "Replace":
            continue
        becomes = sum(of.get(letter, other) for letter in step["content"])
        text, expression = step["pattern"].get("String"), step["pattern"].get("Regex")
        if text:
            share = becomes / len(text)
            of |= {letter: max(of.get(letter, other), share) for letter in text}
        elif expression is not None and _takes_a_letter(expression):
            of = {letter: max(growth, becomes) for letter, growth in of.items()}
            other = max(other, becomes)
        else:  # it may be put in before each letter
            of = {letter: growth + becomes for letter, growth in of.items()}
            other += becomes
    return max([1.0, other, *of.values()])


def _takes_a_letter(expression: str) -> bool:
    """Whether each match is sure to be of a letter or more."""
    try:
        return re.search(expression, "") is None and not re.search(
            r"\(\?[=!<]|\\[bBAZzG]|\^|\$", expression
        )
    except re.error:
        return False


def _copies(steps: list[dict[str, Any]]) -> int:
    """How often a text's tokens come in the result."""
    copies = 1
    for step in steps:
        if step["type"] == "TemplateProcessing":
            copies *= max(1, sum("Sequence" in piece for piece in step["single"]))
    return copies
