"""Every family of models that the tree engine runs or refuses, as tiny random configurations.

`python -m tests.engine.families > docs/families.md` writes the table of what is so; that it is so
is the business of `test_families.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.engine import native_forward
from pipeline.errors import ModelError
from pipeline.model.families import why_unsupported
from pipeline.model.model import LoadedModel
from pipeline.model.shape import read_shape
from tests.engine.tiny import EOS, VOCABULARY

Options = dict[str, Any]
# fmt: off
_COMMON: Options = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None,
}
_GROUPED: Options = {"num_key_value_heads": 2}
_EXPERTS: Options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED: Options = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LLAMA3: Options = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}
_YARN: Options = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE: Options = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8, "original_max_position_embeddings": 64,
}
_DYNAMIC: Options = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# fmt: on


@dataclass(frozen=True)
class Family:
    """One configuration that runs with reuse: its name for people, and what is special about it.

    `bound` limits the difference of any logit in float32, as a share of the largest one.
    """

    name: str
    model_type: str
    variant: str
    options: Options = field(default_factory=dict)
    bound: float = 1e-5

    @property
    def id(self) -> str:
        """Unique in the table."""
        return f"{self.model_type}, {self.variant}"

    def config(self) -> Any:
        """A tiny one."""
        return AutoConfig.for_model(self.model_type, **_COMMON | self.options)


@dataclass(frozen=True)
class Refused:
    """One configuration that the prefix engine does not run, and a part of the reason it gives."""

    name: str
    model_type: str
    says: str
    options: Options = field(default_factory=dict)
    is_tiny: bool = False

    def config(self) -> Any:
        """A tiny one where that can be built, else the family's usual one."""
        common = _COMMON if self.is_tiny else {}
        return AutoConfig.for_model(self.model_type, **common | self.options)


# fmt: off
FAMILIES = [
    Family("GPT-2", "gpt2", "learned positions"),
    Family("GPT-2", "gpt2", "scores scaled by layer",
           {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    Family("OPT", "opt", "norm before", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    Family("OPT", "opt", "norm after, projected embedding",
           {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    Family("Llama", "llama", "grouped heads", _GROUPED),
    Family("Llama", "llama", "biases, tied head, llama3 rotary", _GROUPED | {
           "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
           "rope_parameters": _LLAMA3}),
    Family("Llama", "llama", "yarn rotary, GELU", {"rope_parameters": _YARN, "hidden_act": "gelu"}),
    Family("Mistral", "mistral", "no window", _GROUPED | {"sliding_window": None}),
    Family("Mistral", "mistral", "window", _GROUPED | {"sliding_window": 12, "head_dim": 32}),
    Family("Mixtral", "mixtral", "no window", _GROUPED | {"num_local_experts": 4}),
    Family("Mixtral", "mixtral", "window", _GROUPED | {
           "num_local_experts": 4, "sliding_window": 8}),
    Family("Qwen2", "qwen2", "no window", _GROUPED),
    Family("Qwen2", "qwen2", "window in the upper layers", _GROUPED | {
           "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    Family("Qwen2-MoE", "qwen2_moe", "no window", _GROUPED | _EXPERTS | {
           "shared_expert_intermediate_size": 32}),
    Family("Qwen2-MoE", "qwen2_moe", "window in some layers", _GROUPED | _EXPERTS | {
           "shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 8}),
    Family("Qwen3", "qwen3", "no window", _GROUPED | {"head_dim": 32, "attention_bias": True}),
    Family("Qwen3", "qwen3", "window in some layers", _GROUPED | _MIXED | {
           "head_dim": 32, "use_sliding_window": True}),
    Family("Qwen3-MoE", "qwen3_moe", "no window", _GROUPED | _EXPERTS | {"head_dim": 16}),
    Family("Qwen3-MoE", "qwen3_moe", "window", _GROUPED | _EXPERTS | {
           "head_dim": 16, "use_sliding_window": True, "sliding_window": 8}),
    Family("Gemma", "gemma", "one KV head for all", {"num_key_value_heads": 1, "head_dim": 32}),
    Family("Gemma-2", "gemma2", "soft-capped scores, window in some layers", _GROUPED | _MIXED | {
           "head_dim": 32, "query_pre_attn_scalar": 16,
           "attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}),
    Family("Gemma-3 (text)", "gemma3_text", "window in some layers, two rotaries",
           _GROUPED | _MIXED | {"head_dim": 32, "query_pre_attn_scalar": 16}),
    Family("Phi", "phi", "partial rotary, norms of heads", {"qk_layernorm": True}),
    Family("Phi-3", "phi3", "no window", _GROUPED),
    Family("Phi-3", "phi3", "window", _GROUPED | {"sliding_window": 12}),
    Family("GPT-NeoX", "gpt_neox", "partial rotary, parallel residual"),
    Family("GPT-NeoX", "gpt_neox", "heads of 24", {
           "hidden_size": 96, "use_parallel_residual": False}),
    Family("Granite", "granite", "multipliers", _GROUPED | {
           "attention_multiplier": 0.3, "residual_multiplier": 0.5,
           "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    Family("Granite-MoE", "granitemoe", "multipliers", _GROUPED | {
           "attention_multiplier": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("OLMo", "olmo", "clipped Q, K and V", _GROUPED | {"clip_qkv": 0.5}),
    Family("OLMo-2", "olmo2", "norms of Q and K", _GROUPED),
    Family("OLMo-3", "olmo3", "window in some layers", _GROUPED | _MIXED),
    Family("OLMoE", "olmoe", "norms of Q and K", _EXPERTS),
    Family("Cohere", "cohere", "interleaved rotary", _GROUPED),
    Family("Cohere", "cohere", "norms of heads", _GROUPED | {"use_qk_norm": True}),
    Family("Cohere-2", "cohere2", "window and rotary in some layers", _GROUPED | _MIXED),
    Family("StarCoder2", "starcoder2", "no window", _GROUPED),
    Family("StarCoder2", "starcoder2", "window", _GROUPED | {"sliding_window": 12}),
    Family("SmolLM3", "smollm3", "rotary in some layers", {"no_rope_layers": [1, 0, 1]}),
    Family("gpt-oss", "gpt_oss", "sinks, window in some layers", _GROUPED | _MIXED | {
           "head_dim": 64, "num_local_experts": 4, "rope_parameters": _YARN}),
]

REFUSED = [
    Refused("Phi-3", "phi3", "'longrope' rotary", {"rope_parameters": _LONGROPE}, True),
    Refused("Llama", "llama", "'dynamic' rotary", {"rope_parameters": _DYNAMIC}, True),
    Refused("Gemma-3 (text)", "gemma3_text", "'dynamic' rotary", {
            "rope_parameters": {"full_attention": _DYNAMIC}}),
    Refused("Mamba", "mamba", "no plain decoder"),
    Refused("RWKV", "rwkv", "no plain decoder"),
    Refused("Jamba", "jamba", "carry a state"),
    Refused("Falcon-H1", "falcon_h1", "carry a state", _GROUPED | {"mamba_d_state": 8}, True),
    Refused("RecurrentGemma", "recurrent_gemma", "carry a state", {"lru_width": 64}, True),
    Refused("Qwen3-Next", "qwen3_next", "carry a state"),
    Refused("BLOOM", "bloom", "by itself", {}, True),
    Refused("CodeGen", "codegen", "by itself", {"rotary_dim": 8}, True),
    Refused("Falcon", "falcon", "by itself", {}, True),
    Refused("GPT-Neo", "gpt_neo", "by itself", {"attention_types": [[["global"], 3]]}, True),
    Refused("GPT-J", "gptj", "by itself", {"rotary_dim": 8}, True),
    Refused("MPT", "mpt", "by itself", {}, True),
    Refused("StableLM", "stablelm", "by itself", _GROUPED, True),
    Refused("XGLM", "xglm", "by itself", {"ffn_dim": 64}, True),
    Refused("GPT-2", "gpt2", "reorder_and_upcast_attn", {"reorder_and_upcast_attn": True}, True),
    Refused("Gemma-3n (text)", "gemma3n_text", "KV of earlier ones"),
    Refused("Gemma-4 (text)", "gemma4_text", "differ in the size"),
    Refused("Gemma-3 (text)", "gemma3_text", "looks ahead", {"use_bidirectional_attention": True}),
    Refused("Gemma-3 (images)", "gemma3", "no plain decoder"),
    Refused("DeepSeek-V3", "deepseek_v3", "two sizes"),
    Refused("Llama-4 (text)", "llama4_text", "chunked attention"),
    Refused("T5", "t5", "encoder-decoder"),
    Refused("any other, such as GLM-4", "glm4", "never compared", {"head_dim": 16}, True),
]
# fmt: on


def load(family: Family, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A random model of this configuration; its shape is read as that of a real one."""
    config = family.config()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        shape = read_shape(folder)
    return LoadedModel(build(config).to(dtype), shape, family.id)


def build(config: Any) -> PreTrainedModel:
    """A random model whose logits are far from flat, so that a wrong key changes them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.data.mul_(4.0)
        else:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def reason_against(refused: Refused) -> str:
    """What a person is told who names such a model."""
    config = refused.config()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            read_shape(folder)
        except ModelError as error:
            return str(error).removeprefix(f"{folder}: ")
    return why_unsupported(config) or "it is not refused"


def page() -> str:
    """The text of docs/families.md."""
    runs = [
        (f.name, f"`{f.model_type}`", f.variant, _forward(f), f"< {f.bound:g}") for f in FAMILIES
    ]
    refuses = [(r.name, f"`{r.model_type}`", reason_against(r)) for r in REFUSED]
    return _PAGE.format(
        runs=_table(("Family", "`model_type`", "Variant", "Forward", "Difference"), runs),
        refuses=_table(("Family", "`model_type`", "What coppice says"), refuses),
    )


_PAGE = """# Model families

Made by `python -m tests.engine.families > docs/families.md`; do not edit.

## With reuse

`tests/engine/test_families.py` runs each of these as a tiny random model on prompts that share.
Windows are of 8 or 12 tokens: shared prefixes, rows' own tokens and answers all cross them. Every
logit that chose a token is compared with the model's own eager attention in float32; *Difference*
bounds it as a share of the largest logit. *Forward* is whose code computes the layers around
attention on a CPU with AVX-512: coppice's (native) or the model's (transformers).

{runs}

## Without reuse

The prefix engine refuses these. Where the sentence names `--engine naive`, that runs them.

{refuses}
"""


def _forward(family: Family) -> str:
    return "native" if native_forward.knows(family.config()) else "transformers"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    print(page(), end="")


_QUICK = (
    "llama, yarn rotary, GELU", "mistral, window", "cohere, interleaved rotary",
    "gemma2, soft-capped scores, window in some layers", "gpt_oss, sinks, window in some layers",
    "smollm3, rotary in some layers",
)  # fmt: skip


def some_quick(families: Sequence[Family], *more: object) -> list[object]:
    """For a parameter: those that are unlike each other; the others are slow tests. `more`: of
    further parameters, the same for each."""
    return [pytest.param(f, *more, marks=() if is_quick(f) else pytest.mark.slow) for f in families]


def is_quick(family: Family) -> bool:
    """Whether the fast suite takes it where it does not take all."""
    return family.id in _QUICK
