"""Whose KV states an entry holds. Knows nothing about files and tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.uint32]


@dataclass(frozen=True)
class Identity:
    """All that KV depends on besides the token ids. Two equal ones may use each other's states.

    `model` and `tokenizer` are hashes of their files, `dtype` is torch's name of it, `layout` is
    (layers, kv_heads, head_dim), `rope` the rope settings as canonical JSON.
    """

    model: str
    tokenizer: str
    dtype: str
    layout: tuple[int, int, int]
    rope: str

    def digest(self) -> str:
        """64 hexadecimal digits."""
        return _sha256(json.dumps(astuple(self)).encode())

    def root(self, salt: str, tenant: str) -> str:
        """The tree in which a tenant's states hang, 64 hexadecimal digits.

        Neither the salt nor the tenant's name can be read from it, and no other tenant's prefix is
        ever below it.
        """
        return _sha256(json.dumps([self.digest(), salt, tenant]).encode())


def entry_key(root: str, token_ids: TokenIds, low: int) -> str:
    """The name of the entry of positions `[low, len(token_ids))` below this root."""
    place = bytes.fromhex(root) + low.to_bytes(8, "little")
    return _sha256(place + token_ids.astype("<u4").tobytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
