"""What a store must say: a dictionary of all prefixes, and KV that follows from the prefix alone.

The KV of a position is a function of the tenant and of all ids up to it, so one comparison tells
whether a load returned the right position of the right prefix of the right tenant.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.kvstore.folder import StoreFolder
from pipeline.kvstore.identity import Identity, TokenIds
from pipeline.kvstore.store import KVStore

IDENTITY = Identity("model", "tokenizer", "float32", (2, 2, 3), "{}")
BUDGET = 1 << 30
Prefix = tuple[int, ...]


def as_ids(prompt: Prefix) -> TokenIds:
    return np.array(prompt, np.uint32)


def kv_of(prompt: Prefix, low: int = 0, tenant: str = "", identity: Identity = IDENTITY) -> Tensor:
    """[layers, 2, kv_heads, len(prompt) - low, head_dim] of positions `[low, len(prompt))`."""
    layers, kv_heads, head_dim = identity.layout
    columns = []
    for end in range(low + 1, len(prompt) + 1):
        seed = hashlib.sha256(f"{tenant} {prompt[:end]}".encode()).digest()[:7]
        draw = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        columns.append(torch.randn(layers, 2, kv_heads, head_dim, generator=draw))
    return torch.stack(columns, dim=3).to(getattr(torch, identity.dtype))


class Oracle:
    """Every prefix of every tenant that the store has."""

    def __init__(self) -> None:
        self.prefixes: set[tuple[str, Prefix]] = set()

    def match(self, prompt: Prefix, tenant: str = "") -> int:
        ends = range(len(prompt), 0, -1)
        return next((end for end in ends if (tenant, prompt[:end]) in self.prefixes), 0)

    def put(self, prompt: Prefix, low: int, tenant: str = "") -> bool:
        stored = self.match(prompt, tenant)
        if not low <= stored < len(prompt):
            return False
        self.prefixes |= {(tenant, prompt[:end]) for end in range(stored + 1, len(prompt) + 1)}
        return True

    def keep_what_is_left(self, store: KVStore) -> None:
        """After an eviction: what is gone must be gone with all that begins with it."""
        left = {
            (tenant, prefix)
            for tenant, prefix in self.prefixes
            if store.match(as_ids(prefix), tenant) == len(prefix)
        }
        assert all(len(p) == 1 or (tenant, p[:-1]) in left for tenant, p in left)
        self.prefixes = left


def check_prompt(store: KVStore, prompt: Prefix, length: int, tenant: str = "") -> None:
    """The store has exactly so much of the prompt, and every piece of it is right."""
    assert store.match(as_ids(prompt), tenant) == length
    pieces = list(store._walk(as_ids(prompt), tenant).pieces())
    edges = [0] + [high for _, _, high in pieces]
    assert [low for _, low, _ in pieces] == edges[:-1]
    assert edges[-1] == length
    if length:
        kv = store.load(as_ids(prompt), 0, length, tenant)
        assert kv is not None and torch.equal(kv, kv_of(prompt[:length], 0, tenant))
        kv = store.load(as_ids(prompt), length // 2, length, tenant)
        assert kv is not None and torch.equal(kv, kv_of(prompt[:length], length // 2, tenant))
    if length < len(prompt):
        assert store.load(as_ids(prompt), 0, length + 1, tenant) is None


def open_store(
    folder: Path, identity: Identity = IDENTITY, budget: int = BUDGET, salt: str = ""
) -> KVStore:
    return KVStore.open(folder, identity, budget, salt)


def entry_paths(folder: Path) -> list[Path]:
    """Files of entries, in the order of their names."""
    place = StoreFolder(folder)
    return [place.entry_path(key) for key in sorted(place.list_entries())]
