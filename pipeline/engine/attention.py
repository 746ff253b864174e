"""The attention function that transformers calls in each layer. Knows slots, not prompts.

Registered under a name that triggers none of transformers' special paths, so masks are never made
and causality is ours: a forward without our `packed_batch` is refused (ARCHITECTURE.md).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.errors import EngineError

ATTENTION_NAME = "coppice_cascade"


def cascade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_batch: PackedBatch | None = None,
    kv_cache: KVCache | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write the new K and V, then attend along each token's own path of the tree.

    query [1, Hq, N, d]; key, value [1, Hkv, N, d], after rotary, not repeated. Returns
    ([1, N, Hq, d], None). Raises EngineError when called by anything but our engines, or when the
    heads are not those that the config promised.
    """
    if packed_batch is None or kv_cache is None:
        raise EngineError("cascade attention was called without a packed batch; use our engine")
    keys, values = kv_cache.arena[int(module.layer_idx)]  # type: ignore[arg-type]
    for made in (key, value):
        if (made.shape[1], made.shape[3]) != (keys.shape[0], keys.shape[2]):
            raise EngineError(
                f"layer {module.layer_idx} made KV of {made.shape[1]} heads x {made.shape[3]}, but "
                f"the model's config promised {keys.shape[0]} x {keys.shape[2]}"
            )
    # Qwen2-MoE alone does not pass its window; a None that is passed means all of the past.
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    keys.index_copy_(1, packed_batch.slots, key[0])
    values.index_copy_(1, packed_batch.slots, value[0])
    copy_short_edges(packed_batch, keys, values)
    rules = AttentionRules(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window or 0,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    kernel, work, queries = packed_batch.kernel, packed_batch.work, query[0].transpose(0, 1)
    if packed_batch.observer is not None:
        packed_batch.observer.take(int(module.layer_idx), queries, rules)  # type: ignore[arg-type]
    if packed_batch.views is not None:
        queries = packed_batch.views.of(int(module.layer_idx), queries)  # type: ignore[arg-type]
    return kernel.attend(queries, keys, values, work, rules).unsqueeze(0), None


def copy_short_edges(batch: PackedBatch, keys: Tensor, values: Tensor) -> None:
    """Short shared edges were computed once; give each range below its own copy."""
    if batch.copy_from is not None:
        for arena in (keys, values):
            arena[:, batch.copy_to] = arena[:, batch.copy_from]


def window_of(attention: Any) -> int:
    """Tokens of the past that a layer sees; 0: all. Some families keep it in the config alone."""
    own = getattr(attention, "sliding_window", None)
    if own is None and attention.config.model_type in ("mistral", "phi3"):
        own = attention.config.sliding_window
    return own or 0


AttentionInterface.register(ATTENTION_NAME, cascade_attention)
