"""A batch of rows as token ids and parameters. Knows nothing about how it became so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.prompts import Rejected
from pipeline.records import SamplingParams

_AT_ONCE = 1 << 20  # tokens
_NO_IDS = np.zeros(0, np.uint32)


@dataclass(frozen=True, eq=False)
class PreparedRequests:
    """Of rows that are scored: `counts` of each row, at least one; of each request as `Requests`
    has it. `cut`: [rows] tokens that were cut from contexts. int64 all. `pieces`: of each request
    its context, which others may have too, and what of its continuation is fed."""

    counts: NDArray[np.int64]
    contexts: NDArray[np.int64]
    last: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    cut: NDArray[np.int64]
    pieces: Sequence[NDArray[np.uint32]]


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Row i has `lengths[i]` ids in `flat` (0: it cannot run, see `rejected`) and `params[i]`.

    `flat`: [sum(lengths)] uint32; `lengths`: [rows] int64; `rejected`: by `row_index`; `segments`:
    by row, of prompts in segments, the tokens of each; `system_tokens`: by row, of a conversation
    that begins with it, those of its system message. Where rows are scored, `lengths` are those of
    their `requests`, whose ids are in pieces, and `flat` is empty.
    """

    flat: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    params: list[SamplingParams]
    rejected: dict[int, Rejected]
    segments: dict[int, list[int]]
    system_tokens: dict[int, int]
    requests: PreparedRequests | None = None

    @property
    def prompts(self) -> list[NDArray[np.uint32]]:
        """The ids of each row."""
        return np.split(self.flat, np.cumsum(self.lengths)[:-1])

    def portions(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """All ids end to end, and how many of each row or request: of requests a million or so at a
        time, since together they are a context once for each continuation."""
        if self.requests is None:
            yield self.flat, self.lengths
            return
        low = tokens = 0
        for stop, length in enumerate(self.lengths.tolist(), 1):
            tokens += length
            if tokens >= _AT_ONCE or stop == len(self.lengths):
                some = self.requests.pieces[2 * low : 2 * stop]
                yield np.concatenate([_NO_IDS, *some]), self.lengths[low:stop]
                low, tokens = stop, 0
