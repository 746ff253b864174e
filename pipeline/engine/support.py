"""Which models the tree engine may run, and the sentence for those it may not.

Reuse is sound only where a prompt token's KV depends on nothing but the tokens before it and its
absolute position (engine.md §3). Knows configs only.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "qwen2", "mistral", "gpt2")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


def why_unsupported(config: Any) -> str | None:
    """One clause that names what is missing, or None when the tree engine can run the model."""
    if config.model_type not in FAMILIES:
        return (
            f"the prefix engine knows {', '.join(FAMILIES)}, not {config.model_type!r}; "
            "run it without reuse by --engine naive"
        )
    uses_window = getattr(config, "use_sliding_window", True)
    if getattr(config, "sliding_window", None) and uses_window:
        return (
            f"its sliding window of {config.sliding_window} tokens limits which part of a prefix "
            "a row may see, and the prefix engine has no windows yet; use --engine naive"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        return (
            f"its {kind!r} rotary frequencies depend on the longest position of a call, so KV of "
            "a prefix cannot be shared; use --engine naive"
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn bypasses the attention interface; use --engine naive"
    return None
