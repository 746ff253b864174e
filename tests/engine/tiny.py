"""Tiny random models of the real architectures, and random prompts that share in every way."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.engine.base import EngineHooks
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.model import LoadedModel
from pipeline.model.shape import ModelShape
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

VOCABULARY = 97
EOS = 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
FAMILIES = ("llama", "qwen2", "mistral", "gpt2")


def build_model(family: str) -> PreTrainedModel:
    """A random model whose logits are far from flat, so that a wrong key changes the argmax."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256,
            bos_token_id=None, eos_token_id=EOS,
        )  # fmt: skip
        model: PreTrainedModel = GPT2LMHeadModel(config)
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=None))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_COMMON))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_COMMON))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model.eval()


def load_tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = build_model(family).to(dtype)
    heads = 4 if family == "gpt2" else 2
    name = str(dtype).removeprefix("torch.")
    shape = ModelShape(family, 2, heads, 16, 256, VOCABULARY, name, {}, (EOS,))
    return LoadedModel(model, shape, f"tiny {family}")


GREEDY = SamplingParams(max_new_tokens=5)
LONGER = SamplingParams(max_new_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.9, top_k=20, seed=7)


def random_prompts(draw: random.Random, rows: int = 24) -> list[list[int]]:
    """Prompts that share nothing, a little, a lot, everything, or continue one another."""
    base = [draw.randrange(4, VOCABULARY) for _ in range(40)]
    prompts: list[list[int]] = []
    for _ in range(rows):
        own = [draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(0, 30))]
        prompt = base[: draw.choice([0, 3, 20, 25, 40])] + own
        if prompts and draw.random() < 0.3:
            prompt = draw.choice(prompts)[:90] + own[: draw.choice([0, 1, 2, 20])]
        prompts.append(prompt or [4])
    return prompts


def plan_of(
    prompts: list[list[int]],
    params: tuple[SamplingParams, ...] = (GREEDY,),
    params_of_row: list[int] | None = None,
    min_prefix_tokens: int = 4,
) -> Plan:
    chosen = np.array(params_of_row or [0] * len(prompts), np.int64)
    ids = [f"row-{i}" for i in range(len(prompts))]
    table = TokenTable.from_lists(prompts, VOCABULARY)
    return build_plan(table, ids, params, chosen, min_prefix_tokens=min_prefix_tokens)


Logits = dict[tuple[int, int], torch.Tensor]


def watch_logits() -> tuple[EngineHooks, Logits]:
    """Hooks, and what they fill with the logits [V] of every chosen token, by (sequence, output
    position)."""
    seen: Logits = {}

    def note(rows: list[int], at: list[int], logits: torch.Tensor) -> None:
        seen.update(zip(zip(rows, at, strict=True), logits.clone(), strict=True))

    return EngineHooks(on_logits=note), seen


def with_backend(engine: PrefixEngine, **changes: Any) -> PrefixEngine:
    """The same engine but for these fields of its backend."""
    return PrefixEngine(engine.loaded, engine.settings, replace(engine.backend, **changes))
