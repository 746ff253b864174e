"""An exhibit: recycled KV as one hands it to `generate()` at first, and why that is wrong.

The suffix `t[r:]` alone, a mask of its length, and the KV of `[0, r)` go into `generate()`, which
takes its ids for the whole text so far. Of what it believes the cache to hold it drops the first r
ids, though these are of the suffix, and it numbers positions by the mask, from the suffix's start:

```
 prompt      0 1 2 3 4 | 5 6 7 8 9 10 11      r = 5, suffix of 7
 fed                             10 11         the first 5 ids of the suffix are gone
 positions                        5  6         instead of 10 and 11
```

Where the suffix is no longer than r, nothing would be left; today's transformers fails then. Those
before 5 fed the last id alone, and left a mask of ones out of account for it: that is emulated.
Never use this for anything but the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from pipeline.experiment.decode import cache_of

Route = Literal["generate", "emulated"]


class NaiveAnswer(NamedTuple):
    """`route`: whether today's `generate()` took the call, or its older rules were emulated."""

    token_ids: tuple[int, ...]
    route: Route


def generate_naively(
    model: PreTrainedModel, suffix: Sequence[int], kv: Tensor, num_new: int
) -> NaiveAnswer:
    """The paper's call. `kv` [layers, 2, kv_heads, r, head_dim] with r >= 1; `suffix` not empty."""
    try:
        return NaiveAnswer(_call_generate(model, suffix, kv, num_new), "generate")
    except (RuntimeError, IndexError, ValueError):
        return NaiveAnswer(_emulate(model, suffix, kv, num_new), "emulated")


def _call_generate(
    model: PreTrainedModel, suffix: Sequence[int], kv: Tensor, num_new: int
) -> tuple[int, ...]:
    own, model.generation_config = model.generation_config, GenerationConfig()
    ids = torch.tensor([list(suffix)], device=model.device)
    try:
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache_of(kv, model.device),
                max_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        model.generation_config = own
    return tuple(output[0, len(suffix) :].tolist())


@torch.inference_mode()
def _emulate(
    model: PreTrainedModel, suffix: Sequence[int], kv: Tensor, num_new: int
) -> tuple[int, ...]:
    """Input preparation of transformers 4.30 to 4.47 for GPT-2, with everything visible."""
    cache: DynamicCache = cache_of(kv, model.device)
    ids = list(suffix)
    while len(ids) < len(suffix) + num_new:
        past = cache.get_seq_length()
        fed = ids[past:] or ids[-1:]
        # Positions count the mask's ones, of which there are as many as ids.
        positions = torch.arange(len(ids) - len(fed), len(ids), device=model.device)
        output: Any = model(
            torch.tensor([fed], device=model.device),
            position_ids=positions.unsqueeze(0),
            attention_mask=torch.ones(1, past + len(fed), dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids.append(int(output.logits[0, -1].argmax()))
    return tuple(ids[len(suffix) :])
