"""What it costs a conversation to give way: saving its KV and loading it, or computing it again.

Both are measured once and kept. Computing a token takes longer the more tokens it sees, copying it
does not, so there is a depth from which on saving is cheaper:

    forward + token * n + pair * n * n / 2  >=  copy + byte * n * (bytes of a token)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, TypeAdapter

from pipeline.engine.backend import Backend
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.measured_once import fingerprint, measured_once, median_seconds
from pipeline.engine.packing import Packer, Piece, pack_prefill
from pipeline.model.model import LoadedModel
from pipeline.plan.conversation_figures import NEVER_SAVED

_FEW, _MANY, _DEEP = 8, 128, 512  # tokens, or as many as the model's context holds
_LONG_S = 0.5  # of one kind of forward: a second one is enough then

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class SpillCost:
    """Seconds. Of computing: `forward_s` for each forward, `token_s` for each token, `pair_s` for
    each token that it sees. Of saving and loading, together: `copy_s` for each conversation, and
    `byte_s` for each byte."""

    forward_s: _Seconds
    token_s: _Seconds
    pair_s: _Seconds
    copy_s: _Seconds
    byte_s: _Seconds

    def compute_s(self, tokens: int, before: int = 0, forwards: int = 1) -> float:
        """Of tokens in a row, which see each other and `before` them others, in some forwards."""
        pairs = tokens * (before + tokens / 2)
        return self.forward_s * forwards + self.token_s * tokens + self.pair_s * pairs

    def save_s(self, num_bytes: int) -> float:
        """Of a conversation that keeps so many."""
        return self.copy_s + self.byte_s * num_bytes

    def break_even_tokens(self, bytes_per_token: int) -> int:
        """From this depth on to save a conversation, all of which is kept, takes no longer than to
        compute it again; `NEVER_SAVED`: it always takes longer."""
        square, fixed = self.pair_s / 2, self.forward_s - self.copy_s
        each = self.token_s - self.byte_s * bytes_per_token
        if not square:
            if each > 0:
                return _whole(-fixed / each)
            return 1 if not each and fixed >= 0 else NEVER_SAVED
        root = each * each - 4 * square * fixed
        return 1 if root < 0 else _whole((math.sqrt(root) - each) / (2 * square))


def _whole(depth: float) -> int:
    return min(NEVER_SAVED, max(1, math.ceil(depth)))


_SCHEMA = TypeAdapter(SpillCost)


def spill_cost(loaded: LoadedModel, backend: Backend, cache: Path | None = None) -> SpillCost:
    """For this model on this device: from the cache, else measured and kept."""
    name = fingerprint(loaded, backend)
    return measured_once("spill", name, lambda: measure(loaded, backend), _SCHEMA, cache)


@torch.inference_mode()
def measure(loaded: LoadedModel, backend: Backend) -> SpillCost:
    """Time forwards and copies that differ in one thing each."""
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    most = loaded.shape.context_length or _DEEP + _FEW
    few, many = max(1, min(_FEW, most // 4)), max(2, min(_MANY, most // 2))
    deep = max(1, min(_DEEP, most - few))
    cache = KVCache(shape, max(deep + few, many), like=next(loaded.model.parameters()))
    cache.arena.zero_()
    bench = _Bench(loaded, backend, cache)
    some_s, more_s = bench.forward_s(few, 0), bench.forward_s(many, 0)
    token_s = max(0.0, more_s - some_s) / (many - few)
    pair_s = max(0.0, bench.forward_s(few, deep) - some_s) / (few * deep)
    some_copy_s, more_copy_s = bench.copy_s(few), bench.copy_s(many)
    byte_s = max(0.0, more_copy_s - some_copy_s) / ((many - few) * cache.bytes_per_token)
    return SpillCost(
        forward_s=max(0.0, some_s - few * token_s),
        token_s=token_s,
        pair_s=pair_s,
        copy_s=max(0.0, some_copy_s - few * cache.bytes_per_token * byte_s),
        byte_s=byte_s,
    )


class _Bench:
    """What is timed."""

    def __init__(self, loaded: LoadedModel, backend: Backend, cache: KVCache) -> None:
        self._backend = backend
        self._packer = Packer(backend.kernel, loaded.device)
        self._cache = cache
        self._device = loaded.device

    def forward_s(self, tokens: int, before: int) -> float:
        """Of one forward over so many tokens of one prompt, behind others that are there."""
        none = np.zeros(0, np.int64)
        piece = Piece(np.ones(tokens, np.int64), before, before, before, ())
        last = torch.tensor([tokens - 1], device=self._device)

        def compute() -> None:
            batch = pack_prefill([piece], (none, none), self._packer)
            self._backend.forward(batch, self._cache, last)

        return median_seconds(compute, self._device, _LONG_S)

    def copy_s(self, tokens: int) -> float:
        """Of their KV, to memory of the host and back."""

        def copy() -> None:
            kv = self._cache.arena[..., :tokens, :]
            kv.copy_(kv.to("cpu", copy=True).to(self._device))

        return median_seconds(copy, self._device, _LONG_S)
