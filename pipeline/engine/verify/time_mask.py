"""Conversations that leave gaps, in one eager forward whose mask changes with time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine.eviction import mask_of
from pipeline.engine.verify.segment_reference import as_masks
from pipeline.engine.verify.stateful_reference import Ids
from pipeline.records import EvictionEvent


@torch.inference_mode()
def masked_logits(model: PreTrainedModel, ids: Ids, log: Sequence[EvictionEvent]) -> Tensor:
    """Of all tokens of a conversation, [n, V], "gap": one forward whose mask changes with time.

    Not for evictions by head.
    """
    count = len(ids)
    at = torch.arange(count, device=model.device)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    held = np.arange(count)
    for event in log:
        gone = held[: event.at][~mask_of(event, held[: event.at])]
        seen[event.at :, gone] = False
    any_model: Any = model
    any_model.set_attn_implementation("eager")
    masks = as_masks(any_model, at[:, None] - at, seen.to(at.device))
    tokens = torch.from_numpy(ids).to(at.device)[None]
    logits: Tensor = any_model(
        input_ids=tokens, position_ids=at[None], attention_mask=masks, use_cache=False
    ).logits[0]
    return logits
