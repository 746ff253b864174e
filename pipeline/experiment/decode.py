"""Greedy decoding from full or recycled KV, a batch of one, never through `generate()`.

```
 positions   0 ......... r ......... m-1 | m ... m+n-2
             KV from the store   fed in one forward    fed one by one
 attention   every fed token sees [0, its own position]: the mask is m long, not m - r
```

`r <= m - 1`: the logits of the last prompt token choose the first new one, so it is always fed.
The length is fixed: a model's end-of-text token is a token like any other here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from pipeline.errors import ModelError


class Generation(NamedTuple):
    """New token ids, and the seconds until the first of them and for the others."""

    token_ids: tuple[int, ...]
    prefill_s: float
    decode_s: float


class GreedyDecoder:
    """Writes `num_new` tokens after a prompt. The model is in evaluation mode on its device."""

    def __init__(self, model: PreTrainedModel, num_new: int) -> None:
        self.model = model
        self.num_new = num_new
        self._device = model.device

    def generate(self, token_ids: Sequence[int], kv: Tensor | None = None) -> Generation:
        """Greedy tokens after `token_ids`; `kv` [layers, 2, kv_heads, r, head_dim]: its beginning.

        The time of moving `kv` to the device is part of `prefill_s`.
        """
        reused = 0 if kv is None else kv.shape[3]
        if not 0 <= reused < len(token_ids):
            raise ValueError(f"{reused} of {len(token_ids)} prompt tokens cannot be reused")
        begin = time.perf_counter()
        cache = cache_of(kv, self._device)
        chosen = self._step(list(token_ids[reused:]), reused, cache)
        first = time.perf_counter()
        new = [chosen]
        while len(new) < self.num_new:
            new.append(self._step(new[-1:], len(token_ids) + len(new) - 1, cache))
        return Generation(tuple(new), first - begin, time.perf_counter() - first)

    def prefill(self, token_ids: Sequence[int]) -> int:
        """The first new token alone, everything computed."""
        return self._step(list(token_ids), 0, DynamicCache())

    def compute_kv(self, token_ids: Sequence[int]) -> Tensor:
        """KV of all positions of a prompt: [layers, 2, kv_heads, n, head_dim], on the CPU.

        Raises ModelError for a model that does not keep every position.
        """
        cache = DynamicCache()
        self.logits(list(token_ids), 0, cache)
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        if any(layer.shape != layers[0].shape for layer in layers) or (
            layers[0].shape[2] != len(token_ids)
        ):
            raise ModelError("the model does not keep the KV of all positions in equal layers")
        return torch.stack(layers).cpu()

    def reference(self, token_ids: Sequence[int], kv: Tensor | None = None) -> tuple[int, ...]:
        """What transformers' own `generate` writes: another loop, for comparison alone."""
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        ids = torch.tensor([list(token_ids)], device=self._device)
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=None if kv is None else cache_of(kv, self._device),
                    max_new_tokens=self.num_new,
                    do_sample=False,
                    pad_token_id=0,
                )
        finally:
            self.model.generation_config = own
        return tuple(output[0, len(token_ids) :].tolist())

    def _step(self, fed: list[int], position: int, cache: DynamicCache) -> int:
        """The likeliest token after `fed`, which begins at `position`; `int` waits for a device."""
        return int(self.logits(fed, position, cache).argmax())

    @torch.inference_mode()
    def logits(self, fed: list[int], position: int, cache: DynamicCache) -> Tensor:
        """Logits after the last of `fed`: [vocabulary]. Appends to the cache."""
        positions = torch.arange(position, position + len(fed), device=self._device)
        seen = cache.get_seq_length() + len(fed)
        output: Any = self.model(
            torch.tensor([fed], device=self._device),
            position_ids=positions.unsqueeze(0),
            attention_mask=torch.ones(1, seen, dtype=torch.long, device=self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[0, -1]
        return logits


def cache_of(kv: Tensor | None, device: torch.device) -> DynamicCache:
    """A cache of transformers that begins with `kv`, which it reads and never writes."""
    cache = DynamicCache()
    if kv is not None:
        for index, layer in enumerate(kv.to(device)):
            cache.update(layer[0].unsqueeze(0), layer[1].unsqueeze(0), index)
    return cache
