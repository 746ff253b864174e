"""What cascade attention computes, in plain torch: the words, the rule, and the slow oracle.

Every kernel of this folder has this meaning. A *span* says that queries `[q_lo, q_hi)` of a
packed forward may look at slots `[kv_lo, kv_hi)` of the KV arena, which hold consecutive prompt
positions from `position` on. Position alone decides what is seen, so shared prefixes, a row's own
past and causality within one forward are all the same thing:

    a query at position p sees a key at position t   iff   p - window < t <= p   (no window: t <= p)

Where documents stand at another position in each row, a token has several queries: one as it stands
in its row, and a *view* for each document, turned to where the token stands in that document's own
frame. All of them are queries here, with positions of their own frame; `owner` says whose they are,
and the results of one token are joined by their log-sum-exps.
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


def sort_by_owner(owner: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offsets [N + 1], queries): those of token t are `queries[offsets[t] : offsets[t + 1]]`."""
    counts = np.bincount(owner)
    return np.append(0, np.cumsum(counts)), np.argsort(owner, kind="stable")


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    spans: KVSpans,
    rules: AttentionRules,
    owner: NDArray[np.int64] | None = None,
) -> Tensor:
    """One layer. query [V, Hq, d]; keys, values [Hkv, capacity, d]; positions [V] int64; `owner`
    [V] the token of each query, None: query i is token i's.

    Returns [N, Hq, d] in the query's dtype, computed in float32; N is one more than the largest
    owner. A token that sees nothing gives zeros.
    """
    owners = np.arange(len(query)) if owner is None else owner
    tokens, heads, head_dim = int(owners.max(initial=-1)) + 1, query.shape[1], query.shape[2]
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
        for query_index, token in enumerate(owners[q_lo:q_hi].tolist()):
            joint = torch.logaddexp(lse[token], part_lse[query_index])
            base = joint.masked_fill(joint == float("-inf"), 0.0)
            part = torch.einsum("hl,hld->hd", (scores[query_index] - base[:, None]).exp(), v)
            out[token] = out[token] * (lse[token] - base).exp()[:, None] + part
            lse[token] = joint
    return out.to(query.dtype)
