"""Attention over a part of the keys, with the log-sum-exp that lets parts be merged exactly.

Two kernels of one signature: `*_reference` is plain torch for every device and dtype; the other one
takes the fused CPU kernel of torch where it exists. `merge` joins partial results
(ARCHITECTURE.md, Attention over a tree).
"""

from __future__ import annotations

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]
"""`(out, lse)`: out [..., M, d] in the dtype of q or float32, lse [..., M] float32 (nats)."""

# Private in torch, so it is looked up once and never required: the reference computes the same.
_flash_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def dense_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, softcap: float = 0.0
) -> Partial:
    """Every query sees every key. q [B, H, M, d], k and v [B, H, L, d].

    `bias` [B, 1, 1 or M, L] is added to the scores: 0 to see a key, -inf not to. A query that sees
    no key gives zeros and an lse of -inf.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    base = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    return torch.matmul((scores - base).exp().to(v.dtype), v), lse


def causal_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0
) -> Partial:
    """Query i sees keys 0..i. q [B, H, M, d], k and v [B, H, M, d]."""
    length = q.shape[-2]
    hidden = torch.full((length, length), float("-inf"), device=q.device).triu(1)
    return dense_reference(q, k, v, scale, hidden, softcap)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Partial:
    """As `dense_reference`, where every query sees a key; fused on CPU."""
    if _flash_cpu is None or q.device.type != "cpu":
        return dense_reference(q, k, v, scale, bias)
    mask = None
    if bias is not None:
        mask = bias.to(q.dtype).expand(-1, 1, q.shape[-2], -1)
    out, lse = _flash_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out, lse


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """As `causal_reference`; fused on CPU."""
    if _flash_cpu is None or q.device.type != "cpu":
        return causal_reference(q, k, v, scale)
    out, lse = _flash_cpu(q, k, v, 0.0, True, scale=scale)
    return out, lse


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Join a partial result over other keys into `out`, `lse` (float32), in place. Exact.

    softmax over the union weighs the two results by exp(lse) / (exp(lse) + exp(part_lse)), which
    is a sigmoid of the difference. `lse` must be finite.
    """
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    out.lerp_(part_out.float(), weight)
    torch.logaddexp(lse, part_lse, out=lse)


def join(out: Tensor, lse: Tensor, owner: Tensor) -> Partial:
    """Results of N tokens and, after them, of their views -> those of the tokens. Exact.

    `out` [H, V, rep, d], `lse` [H, V, rep] float32, finite; `owner` [V - N] the token of each view.
    """
    tokens = lse.shape[1] - len(owner)
    owners = torch.cat([torch.arange(tokens, device=owner.device), owner])
    index = owners.view(1, -1, 1).expand_as(lse)
    best = lse[:, :tokens].scatter_reduce(1, index[:, tokens:], lse[:, tokens:], "amax")
    weights = (lse - best[:, owners]).exp()
    total = torch.zeros_like(best).index_add_(1, owners, weights)
    summed = torch.zeros_like(out[:, :tokens])
    summed.index_add_(1, owners, out * weights.unsqueeze(-1))
    return summed / total.unsqueeze(-1), best + total.log()
