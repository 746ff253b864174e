"""Which requests a row asks: the rows of a plan's table are requests, those of the input are not.

```
 input row     0                    1 (cannot run)   2
 requests      ctx|yes  ctx|no      (none)           ctx|a  ctx|b  ctx|c
 table row     0        1           2 (empty)        3      4      5
 bounds        0                    2                3                    6
```

A row that cannot run has one empty request, so that every row has a first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.token_table import Ids, TokenTable


@dataclass(frozen=True, eq=False)
class Requests:
    """`bounds` [rows + 1] int64. By request int64: `contexts`, tokens of its context; `last`, the
    id of its last token, which no prompt holds; `num_bytes` of its continuation's text. `cut`
    [rows] int64: tokens that were cut from the contexts of a row."""

    bounds: NDArray[np.int64]
    contexts: NDArray[np.int64]
    last: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    cut: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """[requests] the row that asks each."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.bounds))

    @property
    def first(self) -> NDArray[np.int64]:
        """[rows] the first request of each."""
        return self.bounds[:-1]

    def of_row(self, row: int) -> range:
        """The requests of one row."""
        return range(*self.bounds[row : row + 2].tolist())

    def of_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The requests of these rows, end to end."""
        counts = np.diff(self.bounds)[rows]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers: NDArray[np.int64] = np.repeat(self.bounds[rows], counts) + offset
        return numbers

    def totals(self, of_request: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows] sums of what is known by request."""
        upto = np.append(0, np.cumsum(of_request))
        totals: NDArray[np.int64] = upto[self.bounds[1:]] - upto[self.bounds[:-1]]
        return totals

    def token_counts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """[requests] tokens of each continuation; `lengths`: of the rows of the table."""
        return np.where(lengths > 0, lengths - self.contexts + 1, 0)

    def continuations(self, table: TokenTable) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of all continuations end to end, and how many of each: as `plan_scores` takes them.

        All but the last of each are the end of its prompt in the table.
        """
        counts = self.token_counts(table.lengths)
        upto = np.cumsum(counts)
        flat = np.zeros(int(upto[-1]) if len(upto) else 0, np.uint32)
        has = counts > 0
        flat[upto[has] - 1] = self.last[has]
        inner = np.maximum(counts - 1, 0)
        offset = np.arange(inner.sum()) - np.repeat(np.cumsum(inner) - inner, inner)
        flat[np.repeat(upto - counts, inner) + offset] = table.flat[
            np.repeat(table.offsets[:-1] + self.contexts, inner) + offset
        ]
        return flat, counts
