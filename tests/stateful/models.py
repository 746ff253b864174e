"""A tiny random Llama of the study's vocabulary and window, and streams for it."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.stateful.streaming import Group
from pipeline.stateful.streams import VOCABULARY, WINDOW, draw_lengths, draw_stream


def build_llama() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def draw_group(rows: int = 3, tokens: int = 300) -> Group:
    rng = random.Random(3)
    lengths = draw_lengths(rng, tokens)
    return Group([draw_stream(rng, lengths) for _ in range(rows)], 0)
