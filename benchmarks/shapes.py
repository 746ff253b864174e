"""Random weights of published shapes, and prompts with a known amount of sharing.

Random weights measure speed and exactness only: nothing that they generate means anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engine.model import LoadedModel, ModelShape
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 32768, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def load_random(shape: str, dtype: str, seed: int = 0) -> LoadedModel:
    """A Llama of that shape with seeded random weights, in evaluation mode, on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    described = ModelShape(
        family="llama",
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context_length=config.max_position_embeddings,
        vocabulary_size=config.vocab_size,
        dtype=dtype,
        generation_config={},
        eos_token_ids=(),
    )
    return LoadedModel(model, described, f"random {shape} Llama")


def shared_prompts(rows: int, shared: int, own: int, vocabulary_size: int) -> list[list[int]]:
    """`rows` prompts of random ids: `shared` tokens in common, then `own` of their own."""
    draw = np.random.default_rng(0)
    prefix = draw.integers(0, vocabulary_size, shared).tolist()
    return [prefix + draw.integers(0, vocabulary_size, own).tolist() for _ in range(rows)]


def workload_prompts(path: Path) -> list[list[int]]:
    """Token ids of a workload file, by the tokenizer beside it, shuffled with a fixed seed."""
    import polars as pl

    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    texts = pl.read_parquet(path, columns=["prompt"])["prompt"]
    encoded = tokenizer.encode_batch(texts.shuffle(seed=0).to_list(), add_special_tokens=False)
    return [e.ids for e in encoded]


def plan_prompts(prompts: list[list[int]], vocabulary_size: int, max_new_tokens: int) -> Plan:
    """Greedy plan that generates exactly `max_new_tokens` for every prompt."""
    params = (SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True),)
    table = TokenTable.from_lists(prompts, vocabulary_size)
    return build_plan(
        table, [str(i) for i in range(len(prompts))], params, np.zeros(len(prompts), np.int64)
    )
