"""Strict attention in plain torch, one query at a time: the fallback of the compiled kernel.

A query's keys and values are gathered in the order of their positions, so the shapes, the numbers
and the calls that follow depend on its position and on nothing beside it. Slow: a call per query.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules, KVSpans
from pipeline.engine.kernels.strict_work import NO_VIEWS, StrictWork


class StrictTorchKernel:
    """See `AttentionKernel`."""

    name = "strict torch"

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> StrictWork:
        assert owner is None, NO_VIEWS
        return StrictWork(spans, positions)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: StrictWork, rules: AttentionRules
    ) -> Tensor:
        tokens, heads, head_dim = query.shape
        out = torch.zeros(tokens, heads, head_dim)
        for i in range(tokens):
            slots = torch.from_numpy(_seen_slots(work, i, rules.window))
            if len(slots):
                q = query[i].reshape(len(keys), -1, head_dim).contiguous()
                out[i] = _attend_one(q, keys[:, slots], values[:, slots], rules)
        return out


def _attend_one(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> Tensor:
    """One query: q [Hkv, rep, d], its keys and values [Hkv, L, d] -> [Hq, d]."""
    scores = q @ k.transpose(1, 2) * rules.scale
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks.view(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[1]]
    return (weights.contiguous() @ v).flatten(0, 1)


def _seen_slots(work: StrictWork, query: int, window: int) -> NDArray[np.int64]:
    """Slots of the keys that a query sees, by position: [L] int64."""
    spans = work.spans
    now = work.positions[query]
    oldest = max(0, now - window + 1) if window else 0
    slots = [np.zeros(0, np.int64)]
    mine = spans[(spans[:, 0] <= query) & (query < spans[:, 1])]
    for _, _, kv_lo, kv_hi, position in mine[np.argsort(mine[:, 4], kind="stable")].tolist():
        low = kv_lo + max(0, oldest - position)
        slots.append(np.arange(low, min(kv_hi, kv_lo + now + 1 - position)))
    return np.concatenate(slots)
