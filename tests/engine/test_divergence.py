"""Divergences against numbers counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.engine.divergence import divergence


def test_of_two_coins() -> None:
    """Three quarters and a quarter, from one half each; certainty, which half the time is wrong."""
    expected, found = torch.tensor([[0.75, 0.25], [1.0, 0.0]]).log(), torch.tensor([0.5, 0.5]).log()
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(expected, found).tolist() == pytest.approx([by_hand, math.log(2.0)])


def test_rounding_takes_none_below_zero() -> None:
    """Seen as -2e-17 in the summary of an audit that had passed, which no command read again."""
    torch.manual_seed(0)
    logits = torch.randn(1000, 50, dtype=torch.float64)
    expected, found = (x.log_softmax(-1) for x in (logits, logits + 1e-9 * torch.randn(1000, 50)))
    assert ((expected.exp() * (expected - found)).sum(-1) < 0).any(), "what this is about"
    assert (divergence(expected, found) >= 0).all()
