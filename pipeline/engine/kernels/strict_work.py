"""What the strict kernels are told of a forward: what each query sees, and nothing of how to do it.

They make no plan that could depend on a query's neighbours, so a part of the queries is described
as easily as all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.kernels.rules import KVSpans

NO_VIEWS = "strict mode sees documents where they were computed, never by views"


@dataclass(frozen=True, slots=True)
class StrictWork:
    """`spans` [S, 5] and `positions` [N] int64 of one forward, as `AttentionKernel.prepare`."""

    spans: KVSpans
    positions: NDArray[np.int64]

    def part(self, low: int, high: int, size: int) -> StrictWork:
        """Queries `[low, high)`, then others that see nothing, `size` in all."""
        spans = self.spans[(self.spans[:, 0] < high) & (self.spans[:, 1] > low)].copy()
        spans[:, :2] = spans[:, :2].clip(low, high) - low
        positions = np.zeros(size, np.int64)
        positions[: high - low] = self.positions[low:high]
        return StrictWork(spans, positions)
