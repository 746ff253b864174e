"""How far one distribution of the next token is from another."""

from __future__ import annotations

from torch import Tensor


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of `found` from `expected`, nats, never below zero.

    Both: log-probabilities [..., V] of one dtype; [...]. What cannot come adds nothing, and
    rounding takes that of equal ones as low as -2e-17, which is no divergence.
    """
    parts = (expected.exp() * (expected - found)).masked_fill(expected == float("-inf"), 0.0)
    return parts.sum(-1).clamp_min(0.0)
