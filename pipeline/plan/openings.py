"""Forced openings: what every answer under a constraint begins with ends the prompt instead.

```
 prompt   ... Label this text: hello. Answer:      {"label":"      prefill, shared where rows are
 answer                                            {"label":"  pos..  decoded from here on
```

So it is computed once for all rows that share their prompt, and never decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.records import SamplingParams

TokenIds = Sequence[int] | NDArray[np.unsignedinteger]
_TAIL_TOKENS: Final = 16  # of a prompt, in which a template may open the thinking


def is_left_open(prompt: TokenIds, begin: Sequence[int], end: Sequence[int]) -> bool:
    """Whether a template has begun the thinking at the end of a prompt, and not ended it."""
    tail = [int(token_id) for token_id in prompt[-_TAIL_TOKENS:]]
    return last_place(tail, begin) > last_place(tail, end)


def last_place(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where it begins for the last time; -1: nowhere."""
    starts = range(len(ids) - len(part), -1, -1)
    found = (at for at in starts if part and list(ids[at : at + len(part)]) == list(part))
    return next(found, -1)


def opened(params: SamplingParams, opening: tuple[int, ...]) -> SamplingParams:
    """The same for a prompt that ends with the opening, or with as much of it as leaves a token to
    be said."""
    fitting = opening[: params.max_new_tokens - 1]
    if not fitting:
        return params
    left = params.max_new_tokens - len(fitting)
    return replace(params, opening=fitting, max_new_tokens=left)


def append_openings(
    flat: NDArray[np.uint32], lengths: NDArray[np.int64], params: Sequence[SamplingParams]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Prompts of `lengths` in `flat`, each with its opening behind it."""
    added = np.array([len(p.opening) for p in params], np.int64)
    if not added.any():
        return flat, lengths
    ids = np.array([token_id for p in params for token_id in p.opening], np.uint32)
    return np.insert(flat, np.repeat(np.cumsum(lengths), added), ids), lengths + added
