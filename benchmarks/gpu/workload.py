"""Models with random weights, and the job and the step that are measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.prompts import Prompts, shared_prompts
from benchmarks.shapes import SHAPES
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.step_memory import DecodeStep
from pipeline.model.model import LoadedModel
from pipeline.model.shape import ModelShape

GPU_SHAPES: dict[str, dict[str, Any]] = SHAPES | {
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
PREFIXES = (1024, 2048, 4096, 8192, 16384)
DRY_PREFIXES = (20,)
_CONTEXT = 32_768


@dataclass(frozen=True)
class Workload:
    """`rows` prompts of `shared` tokens in common and `own` of their own, `new` tokens each."""

    rows: int = 256
    shared: int = 2000
    own: int = 128
    new: int = 128

    def prompts(self, vocabulary_size: int) -> Prompts:
        """Random token ids."""
        return shared_prompts(self.rows, self.shared, self.own, vocabulary_size)

    @property
    def own_half_way(self) -> int:
        """Tokens of a row alone in the middle of the job."""
        return self.own + self.new // 2

    def half_way(self, prefix: int) -> DecodeStep:
        """The step in the middle of the job, below a prefix of so many tokens, in slots from 0."""
        length = self.own_half_way
        rows = np.arange(self.rows)
        low = prefix + rows * length
        own = np.stack([rows, rows + 1, low, low + length, rows * 0 + prefix], 1)
        spans = np.concatenate([[[0, self.rows, 0, prefix, 0]], own])
        return DecodeStep(rows, rows * 0 + prefix + length - 1, low + length - 1, spans)

    def live_tokens(self, prefix: int) -> int:
        """Slots that `half_way` reads."""
        return prefix + self.rows * self.own_half_way


WORKLOAD = Workload()
DRY_WORKLOAD = Workload(rows=9, shared=12, own=2, new=3)


def load_random(shape: str, device: torch.device) -> LoadedModel:
    """A Llama in bfloat16 made on the device, with seeded random weights; it never stops."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **GPU_SHAPES[shape], max_position_embeddings=_CONTEXT, bos_token_id=None, eos_token_id=None
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    described = ModelShape(
        family="llama",
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context_length=_CONTEXT,
        vocabulary_size=config.vocab_size,
        dtype="bfloat16",
        generation_config={},
        eos_token_ids=(),
    )
    return LoadedModel(model, described, f"random {shape} Llama")


def random_cache(loaded: LoadedModel, capacity: int, layers: int) -> KVCache:
    """Of random numbers, as if all of it had been computed."""
    shape = (layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    cache = KVCache(shape, capacity, like=next(loaded.model.parameters()))
    cache.arena.normal_()
    return cache
