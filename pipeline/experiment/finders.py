"""Where recycled KV comes from: nowhere, the nearest embedding, or the longest stored prefix.

```
 NoReuse           r = 0
 NearestEmbedding  the paper's rule: the candidate's whole text must begin the prompt, so r = k
 LongestPrefix     any r that the store has, cut anywhere inside an entry
```

All cut r to m - 1. Each counts its own time: embedding, lookup, load.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.experiment.retrieval import EmbeddingIndex
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.store import KVStore


@dataclass(frozen=True)
class Found:
    """KV [layers, 2, kv_heads, reused, head_dim] of the beginning of a prompt, or None.

    `source`, `similarity`: of the nearest kept prompt, used or not, where one was looked for.
    """

    kv: Tensor | None = None
    source: str = ""
    similarity: float | None = None
    embed_s: float = 0.0
    lookup_s: float = 0.0
    load_s: float = 0.0

    @property
    def reused(self) -> int:
        """Prompt tokens that need not be computed."""
        return 0 if self.kv is None else int(self.kv.shape[3])


class NoReuse:
    """The baseline."""

    def find(self, text: str, token_ids: TokenIds) -> Found:
        return Found()


class NearestEmbedding:
    """`names` and `kept` are those of the index's prompts, by key."""

    def __init__(
        self, index: EmbeddingIndex, names: Sequence[str], kept: Sequence[TokenIds], store: KVStore
    ) -> None:
        self._index = index
        self._names = names
        self._kept = kept
        self._store = store

    def find(self, text: str, token_ids: TokenIds) -> Found:
        """The nearest prompt's KV, if all of its tokens begin `token_ids`."""
        nearest = self._index.nearest(text)
        begin = time.perf_counter()
        kept = self._kept[nearest.key]
        is_prefix = len(kept) <= len(token_ids) and np.array_equal(kept, token_ids[: len(kept)])
        reused = min(len(kept), len(token_ids) - 1) if is_prefix else 0
        lookup_s = nearest.search_s + time.perf_counter() - begin
        begin = time.perf_counter()
        kv = self._store.load(token_ids, 0, reused) if reused else None
        load_s = time.perf_counter() - begin
        name = self._names[nearest.key]
        return Found(kv, name, nearest.score, nearest.embed_s, lookup_s, load_s)


class LongestPrefix:
    """The store's own lookup, by token ids; `tenant` as the store has it."""

    def __init__(self, store: KVStore, tenant: str = "") -> None:
        self._store = store
        self._tenant = tenant

    def find(self, text: str, token_ids: TokenIds) -> Found:
        begin = time.perf_counter()
        length = self._store.match(token_ids, self._tenant)
        reused = min(length, len(token_ids) - 1)
        looked = time.perf_counter()
        kv = self._store.load(token_ids, 0, reused, self._tenant) if reused else None
        return Found(kv, lookup_s=looked - begin, load_s=time.perf_counter() - looked)


Finder = NoReuse | NearestEmbedding | LongestPrefix
"""Looks for KV of the beginning of a prompt."""
