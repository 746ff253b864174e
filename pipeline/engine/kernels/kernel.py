"""What a kernel promises: the host describes a forward once, every layer attends by it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules, KVSpans


class AttentionKernel(Protocol):
    """Computes what `attend_reference` computes."""

    name: str

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> Any:
        """The work of one forward of V queries at `positions` [V]; valid for all its layers.

        `owner` [V]: the token of each query, the first N of them 0 .. N - 1; None: V is N.
        """

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: Any, rules: AttentionRules
    ) -> Tensor:
        """query [V, Hq, d], keys and values [Hkv, capacity, d] -> [N, Hq, d], query's dtype."""
