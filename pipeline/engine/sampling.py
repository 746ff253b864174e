"""From logits to the next token. Knows rows by a noise key, not by their place in a batch.

The noise of a row at a position depends only on (seed, row id, position): neither batch order nor
resume can change an answer, and an audit can repeat it (ARCHITECTURE.md, Trust).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.candidates import Law, draw, total_weights, widths
from pipeline.records import SamplingParams


class Sampled(NamedTuple):
    """`token_ids` [rows] int64 and `is_finite` [rows] bool: False where no token can be chosen,
    since the logits or what became of them held a NaN or no number at all."""

    token_ids: NDArray[np.int64]
    is_finite: NDArray[np.bool_]


def uniform_noise(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position): two rounds of splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        x = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_next_token(
    logits: Tensor,
    params: Sequence[SamplingParams],
    keys: NDArray[np.uint64],
    positions: NDArray[np.int64],
    greedy: Sampled | None = None,
) -> Sampled:
    """Choose one token a row. logits [rows, V]; `positions` [rows] of the token to be chosen.

    `greedy`: the likeliest tokens, where the device has found them already.
    """
    token_ids, is_finite = greedy or likeliest_token(logits)
    sampled = [i for i, p in enumerate(params) if not p.is_greedy]
    if sampled:
        noise = uniform_noise(keys[sampled], positions[sampled])
        of_sampled = logits if len(sampled) == len(params) else logits[sampled]
        chosen, total = draw_tokens(of_sampled, [params[i] for i in sampled], noise)
        token_ids, is_finite = token_ids.copy(), is_finite.copy()
        token_ids[sampled] = chosen.cpu().numpy()
        is_finite[sampled] &= total.isfinite().cpu().numpy()
    return Sampled(token_ids, is_finite)


def likeliest_token(logits: Tensor) -> Sampled:
    """The first of the largest logits of each row. logits [rows, V]."""
    best, token_ids = logits.max(-1)
    return Sampled(token_ids.cpu().numpy(), best.isfinite().cpu().numpy())


def draw_tokens(
    logits: Tensor, params: Sequence[SamplingParams], noise: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """First token, by falling probability, at which the kept mass exceeds the noise, and that mass.

    Both [rows]. A mass that is no number gives some token that means nothing; one that was not
    added up is said to be 1. Rows whose likeliest tokens do not settle it are sorted whole.
    """
    rows, vocabulary = logits.shape
    law = Law.of(params, vocabulary, logits.device)
    drawn = torch.from_numpy(noise).to(logits.device)
    token_ids = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    mass = torch.ones(rows, dtype=torch.float64, device=logits.device)
    left, total = torch.arange(rows, device=logits.device), mass
    tries = widths(vocabulary)
    if tries and any((p.top_k or vocabulary) >= vocabulary for p in params):
        total = total_weights(logits, law)
    for width in tries:
        few = logits if len(left) == rows else logits[left]
        found = draw(few, law[left], total[left], drawn[left], width)
        token_ids[left] = found.token_ids
        left = left[~found.is_settled]
        if not len(left):
            return token_ids, mass
    token_ids[left], mass[left] = _invert_cdf(logits[left].double(), law[left], drawn[left])
    return token_ids, mass


def _invert_cdf(logits: Tensor, law: Law, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw_tokens`, by all tokens. logits [rows, V], noise [rows]: float64."""
    order, cumulative = _truncated_cdf(logits, law)
    total = cumulative[:, -1:].contiguous()
    rank = torch.searchsorted(cumulative, noise.unsqueeze(1) * total, right=True)
    last = torch.searchsorted(cumulative, total)  # of those kept: rounding may lead beyond it
    rank = torch.minimum(rank, last).clamp_(max=logits.shape[1] - 1)
    return order.gather(1, rank).squeeze(1), total.squeeze(1)


def truncated_cdf(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Tokens by falling probability and the running sum of what temperature, top-k, top-p keep.

    logits [rows, V] float64 -> (order [rows, V] int64, cumulative [rows, V] float64). The sort is
    stable, so equal logits keep the order of their ids.
    """
    return _truncated_cdf(logits, Law.of(params, logits.shape[1], logits.device))


def _truncated_cdf(logits: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    probs = torch.softmax(logits / law.temperature.unsqueeze(1), -1)
    probs, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    probs = probs.masked_fill(rank >= law.top_k.unsqueeze(1), 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= law.top_p.unsqueeze(1), 0.0)
    return order, probs.cumsum(-1)
