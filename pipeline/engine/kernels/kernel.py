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

    def prepare(self, spans: KVSpans, positions: NDArray[np.int64]) -> Any:
        """The work of one forward of N queries at `positions` [N]; valid for all its layers."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: Any, rules: AttentionRules
    ) -> Tensor:
        """query [N, Hq, d], keys and values [Hkv, capacity, d] -> [N, Hq, d], query's dtype."""
