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
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.experiment.decode import GreedyDecoder, cache_of

Route = Literal["generate", "emulated"]


class NaiveAnswer(NamedTuple):
    """`route`: whether today's `generate()` took the call, or its older rules were emulated."""

    token_ids: tuple[int, ...]
    route: Route


def generate_naively(
    model: PreTrainedModel, suffix: Sequence[int], kv: Tensor, num_new: int
) -> NaiveAnswer:
    """The paper's call. `kv` [layers, 2, kv_heads, r, head_dim] with r >= 1; `suffix` not empty."""
    decoder = GreedyDecoder(model, num_new)
    try:
        return NaiveAnswer(decoder.reference(suffix, kv), "generate")
    except (RuntimeError, IndexError, ValueError):
        return NaiveAnswer(_emulate(decoder, suffix, kv), "emulated")


def _emulate(decoder: GreedyDecoder, suffix: Sequence[int], kv: Tensor) -> tuple[int, ...]:
    """Input preparation of transformers 4.30 to 4.47 for GPT-2, with everything visible."""
    cache, ids = cache_of(kv, decoder.model.device), list(suffix)
    while len(ids) < len(suffix) + decoder.num_new:
        fed = ids[cache.get_seq_length() :] or ids[-1:]
        # Positions count the mask's ones, of which there are as many as ids.
        logits = decoder.logits(fed, len(ids) - len(fed), cache)
        ids.append(int(logits.argmax()))
    return tuple(ids[len(suffix) :])
