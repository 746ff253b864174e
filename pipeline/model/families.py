"""Which models the tree engine may run, and the sentence for those it may not.

Reuse is sound only where a prompt token's KV depends on nothing but the tokens before it and its
absolute position (ARCHITECTURE.md). A family is admitted when `tests/engine/test_families.py`
compares it with its own eager attention; `docs/families.md` is made from that table. Knows configs
only.
"""

from __future__ import annotations

from typing import Any

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt2", "opt",
    "gpt_neox", "gpt_oss", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "granite", "granitemoe",
    "olmo", "olmo2", "olmo3", "olmoe", "cohere", "cohere2", "starcoder2", "smollm3",
)  # fmt: skip
_OWN_ATTENTION = (
    "bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt",
    "stablelm", "xglm",
)  # fmt: skip
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_KNOWN_LAYERS = ("full_attention", "sliding_attention")
_RECURRENT_LAYERS = ("conv", "hybrid", "linear_attention", "mamba", "recurrent")
_LEARNED_POSITIONS = ("gpt2", "opt")
_EVICTORS_OF_RECENT = ("none", "oldest", "window")
"""What they keep lies side by side."""
_EXPERTS = ("num_experts", "num_local_experts")


def why_unsupported(config: Any) -> str | None:
    """One clause that names what is missing, or None when the tree engine can run the model."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model continues no prompt; name a decoder such as Llama or Qwen3"
    reason = _why_attention_is_unlike(config) or _why_family_is_unknown(config)
    reason = reason or _why_kv_is_not_its_own(config)
    return None if reason is None else f"{reason}; run it without reuse by --engine naive"


def why_documents_stay(family: str) -> str | None:
    """One sentence why documents cannot be reused at any position, or None where they can."""
    if family not in _LEARNED_POSITIONS:
        return None
    return (
        f"a {family!r} model learns a vector for each position, so what a document says "
        "depends on where it stands; choose --reuse prefix"
    )


def why_nothing_is_evicted(family: str, slides: bool, evictor: str) -> str | None:
    """One sentence why a history cannot give up tokens so, or None where it can.

    `slides`: some layers see the last tokens alone, see `has_sliding_layers`.
    """
    if family in _LEARNED_POSITIONS:
        return (
            f"a {family!r} model learns a vector for each position, so no conversation can outgrow "
            "its context; choose --evict none"
        )
    if slides and evictor not in _EVICTORS_OF_RECENT:
        return (
            "layers with sliding-window attention would see tokens that are older than they "
            f"stand; choose --evict {', '.join(_EVICTORS_OF_RECENT[:-1])} or "
            f"{_EVICTORS_OF_RECENT[-1]}"
        )
    return None


def has_sliding_layers(config: Any) -> bool:
    """Whether some layers see fewer tokens than the model's context has."""
    window, context = (
        getattr(config, name, None) for name in ("sliding_window", "max_position_embeddings")
    )
    layers = getattr(config, "layer_types", None)
    is_set = "sliding_attention" in layers if layers else window is not None
    return bool(is_set and (window is None or context is None or window < context))


def has_experts(config: Any) -> bool:
    """Whether a router sends each token to a few of the model's experts."""
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)


def _why_attention_is_unlike(config: Any) -> str | None:
    """What the layers do that the KV cache or the kernels have no place for."""
    # Before transformers 5.20 some families named their layers in `layers_block_type` alone.
    names = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = set(names or ())
    if layers.intersection(_RECURRENT_LAYERS):
        return (
            "some of its layers carry a state from token to token, and the prefix engine keeps no "
            "states at the ends of prefixes"
        )
    if "chunked_attention" in layers:
        return (
            "its chunked attention sees nothing of earlier chunks, and the kernels know no chunks"
        )
    if getattr(config, "is_heterogeneous", False):
        return "its layers differ in the size or number of their heads, and the KV cache has one"
    if getattr(config, "kv_lora_rank", None):
        return "its latent attention has keys and values of two sizes, and the KV cache has one"
    if getattr(config, "num_kv_shared_layers", None):
        return "its last layers read the KV of earlier ones, and the KV cache has no such layers"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead, so the KV of a prefix depends on what follows it"
    return None


def _why_family_is_unknown(config: Any) -> str | None:
    family = config.model_type
    if family in _OWN_ATTENTION:
        return (
            f"transformers computes the attention of a {family!r} model by itself and lets nothing "
            "take its place"
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        return "its reorder_and_upcast_attn lets nothing take the place of its own attention"
    unknown = set(getattr(config, "layer_types", None) or ()).difference(_KNOWN_LAYERS)
    if family not in FAMILIES or unknown:
        layers = f" with {sorted(unknown)[0]!r} layers" if unknown else ""
        return f"the prefix engine was never compared with a {family!r} model{layers}"
    return None


def _why_kv_is_not_its_own(config: Any) -> str | None:
    """A KV entry may depend on nothing that another row of the same call can change."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    for kind in (r.get("rope_type", "default") for r in by_layer):
        if kind not in _FIXED_ROPE:
            return (
                f"its {kind!r} rotary frequencies depend on the longest position of a call, so KV "
                "of a prefix cannot be shared"
            )
    return None
