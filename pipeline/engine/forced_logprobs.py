"""Log-probabilities of tokens that nobody chose: those of forced runs, read where they are fed.

```
 token_ids   .. chosen, forced, forced, forced
 positions        p      p+1     p+2     p+3         the logits at p are of the token at p+1
```

A row whose answer ends in the middle of this waits for them (`LiveRow.over`), and its last token is
not fed. One that gave up its place in between computes them again with all else.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.live import LiveRow
from pipeline.engine.logprobs import read_logprobs
from pipeline.engine.prefill import Chunk

MOST_READ: Final = 1024
"""Positions of a forward that are read for this, each as wide as the vocabulary."""
_AT_ONCE: Final = 64  # in float32


class Unread(NamedTuple):
    """Tokens `[low, high)` of an answer, which the logits of packed tokens from `at` on give."""

    row: LiveRow
    low: int
    high: int
    at: int


def unread(chunks: list[Chunk]) -> list[Unread]:
    """What a forward over `chunks` is asked for."""
    found, first = [], 0
    for job, low, high in chunks:
        row = job.target
        if isinstance(row, LiveRow) and row.is_unread:
            begin = max(len(row.logprobs), low - row.end + 1)
            stop = min(len(row.token_ids), high - row.end + 1)
            if begin < stop:
                found.append(Unread(row, begin, stop, first + row.end - 1 + begin - low))
        first += high - low
    return found


def count(chunks: list[Chunk]) -> int:
    """Positions that they read."""
    return sum(one.high - one.low for one in unread(chunks))


def places(found: list[Unread]) -> NDArray[np.int64]:
    """Packed tokens whose logits are read."""
    ranges = [np.arange(one.at, one.at + one.high - one.low) for one in found]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def note(found: list[Unread], logits: Tensor) -> list[LiveRow]:
    """Give rows what `logits` [positions, V] say of their tokens. Returns the rows of which they
    say nothing, whose answers end there."""
    lost = []
    for row, low, high, _ in found:
        own, logits = logits[: high - low], logits[high - low :]
        assert len(row.logprobs) == low, "what stands before is read before"
        for begin in range(0, high - low, _AT_ONCE):
            some = own[begin : begin + _AT_ONCE]
            ids = row.token_ids[low + begin : low + begin + len(some)]
            row.logprobs += read_logprobs(some, ids, [row.params.logprobs or 0] * len(ids))
        wrong = [k for k in range(low, high) if not math.isfinite(row.logprobs[k].logprob)]
        if wrong:
            del row.token_ids[wrong[0] + 1 :]
            lost.append(row)
    return lost
