"""A GPT-2 of any shape with random weights: it takes the time of a real one, and says nothing."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

Shape = tuple[int, int, int]
"""Layers, heads, width."""


def build_random_gpt2(shape: Shape, vocabulary: int) -> GPT2LMHeadModel:
    """Always the same weights, float32, in evaluation mode; a context of 1,024 positions."""
    layers, heads, width = shape
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)
