"""Rows that ask for several samples: which sequences are theirs. Knows no text and no device.

```
 row of the table      a         b    c
 its sequences         0  1  2   3    4  5
 `sample`              0  1  2   0    0  1
```
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan


class Samples:
    """Of one plan, whose sequences are all those of each of its rows."""

    def __init__(self, plan: Plan) -> None:
        sample = plan.sequences.sample
        self._sample = sample
        self._sequence_of_row = plan.sequence_of_row
        self.are_several = bool(sample.any())
        """Whether some row has more than one."""
        firsts = np.flatnonzero(sample == 0)
        self._counts = np.zeros(len(sample), np.int64)
        self._counts[firsts] = np.diff(np.append(firsts, len(sample)))

    def first(self, sequence: int) -> int:
        """The sequence of the first sample of the row that this one belongs to."""
        return sequence - int(self._sample[sequence])

    def count(self, first: int) -> int:
        """Samples of the row whose first sequence this is."""
        return int(self._counts[first])

    def sequences(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ascending, all sequences that answer these rows of the table."""
        first = self._sequence_of_row[rows]
        first = np.unique(first[first >= 0])
        counts = self._counts[first]
        before = np.cumsum(counts) - counts
        return np.repeat(first - before, counts) + np.arange(counts.sum())
