"""What cascade attention computes, in plain torch: the words, the rule, and the slow oracle.

Every kernel of this folder has this meaning. A *span* says that queries `[q_lo, q_hi)` of a
packed forward may look at slots `[kv_lo, kv_hi)` of the KV arena, which hold consecutive prompt
positions from `position` on. Position alone decides what is seen, so shared prefixes, a row's own
past and causality within one forward are all the same thing:

    a query at position p sees a key at position t   iff   p - window < t <= p   (no window: t <= p)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KVSpans = NDArray[np.int64]
"""[spans, 5]: q_lo, q_hi, kv_lo, kv_hi, position. No key is seen twice by a query."""


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """How scores become weights in one layer.

    `scale` multiplies them; `softcap` c > 0 maps them to c * tanh(score / c) (Gemma-2); `window`
    0 means all of the past; `sinks` [Hq] float32 is one more score in every softmax, without a
    value (gpt-oss).
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    spans: KVSpans,
    rules: AttentionRules,
) -> Tensor:
    """One layer. query [N, Hq, d]; keys, values [Hkv, capacity, d]; positions [N] int64.

    Returns [N, Hq, d] in the query's dtype, computed in float32. A query that sees nothing gives
    zeros.
    """
    tokens, heads, head_dim = query.shape
    rep = heads // keys.shape[0]
    out = torch.zeros(tokens, heads, head_dim, dtype=torch.float32, device=query.device)
    lse = torch.full((tokens, heads), float("-inf"), device=query.device)
    if rules.sinks is not None:
        lse = lse.logaddexp(rules.sinks)
    for q_lo, q_hi, kv_lo, kv_hi, position in spans.tolist():
        k, v = (x[:, kv_lo:kv_hi].float().repeat_interleave(rep, 0) for x in (keys, values))
        scores = torch.einsum("nhd,hld->nhl", query[q_lo:q_hi].float(), k) * rules.scale
        if rules.softcap:
            scores = rules.softcap * torch.tanh(scores / rules.softcap)
        at = torch.arange(position, position + kv_hi - kv_lo, device=query.device)
        age = positions[q_lo:q_hi, None] - at
        seen = (age >= 0) & (age < rules.window) if rules.window else age >= 0
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        part_lse = scores.logsumexp(-1)
        joint = torch.logaddexp(lse[q_lo:q_hi], part_lse)
        base = joint.masked_fill(joint == float("-inf"), 0.0)
        part = torch.einsum("nhl,hld->nhd", (scores - base[..., None]).exp(), v)
        out[q_lo:q_hi] = out[q_lo:q_hi] * (lse[q_lo:q_hi] - base).exp()[..., None] + part
        lse[q_lo:q_hi] = joint
    return out.to(query.dtype)
