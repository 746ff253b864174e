"""Strict attention by the compiled CPU kernel: see strict.cpp for the order of its roundings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules, KVSpans
from pipeline.engine.kernels.strict_work import NO_VIEWS, StrictWork


class StrictNativeKernel:
    """See `AttentionKernel`. For float32, heads of a multiple of 16, and a loaded library."""

    name = "strict native"

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> StrictWork:
        assert owner is None, NO_VIEWS
        return StrictWork(np.ascontiguousarray(spans), np.ascontiguousarray(positions))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: StrictWork, rules: AttentionRules
    ) -> Tensor:
        out: Tensor = torch.ops.coppice.strict_attention(
            query, keys, values, torch.from_numpy(work.positions), torch.from_numpy(work.spans),
            rules.scale, rules.window, rules.softcap, rules.sinks,
        )  # fmt: skip
        return out
