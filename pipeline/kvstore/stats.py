"""What a store has counted. Knows nothing about what it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStats:
    """Counts since the store was opened. `hits` and `misses` are of `match` and of failed loads.

    `load_s` is the time inside `load`; pages that a caller touches later come on its own time.
    `other_identity`: entries of other models, tokenizers, dtypes or rope settings at open.
    """

    hits: int = 0
    misses: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    puts: int = 0
    evictions: int = 0
    quarantined: int = 0
    other_identity: int = 0
