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

import numpy as np
from numpy.typing import NDArray

from pipeline.records import SamplingParams


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
