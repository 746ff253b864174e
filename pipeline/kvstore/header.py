"""The file of one entry up to its KV: a safetensors header and the token ids. Knows no tensors.

```
 8 bytes: length of the header │ header, JSON, padded │ token_ids [high] u32 │ kv
                                                                      a multiple of 64 ┘
```
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from typing import Any, NamedTuple

import numpy as np

from pipeline.kvstore.identity import TokenIds

SCHEMA = "1"
_ALIGNMENT = 64
_LONGEST_HEADER = 4096
_LENGTH_BYTES = 8
_FIRST_READ = 4096  # the header, and the ids of most prompts
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
}
"""Torch's name -> (that of safetensors, bytes)."""
_NAMES = {code: name for name, (code, _) in DTYPES.items()}
_DIGEST = re.compile("[0-9a-f]{64}")


class BadEntry(Exception):
    """An entry is not what it should be. The message says how and quotes nothing of it."""


class Head(NamedTuple):
    """What an entry says about itself. `checksum`: of the bytes of `kv`, 32 hexadecimal digits.

    `shape` is (layers, kv_heads, head_dim): `kv` is [layers, 2, kv_heads, high - low, head_dim].
    """

    identity: str
    root: str
    low: int
    high: int
    dtype: str
    shape: tuple[int, int, int]
    checksum: str

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """Of the tensor `kv`."""
        layers, kv_heads, head_dim = self.shape
        return layers, 2, kv_heads, self.high - self.low, head_dim

    @property
    def kv_bytes(self) -> int:
        """Of the tensor `kv`."""
        return math.prod(self.kv_shape) * DTYPES[self.dtype][1]

    @property
    def kv_offset(self) -> int:
        """Where in the file the KV begins."""
        return len(self.encode()) + 4 * self.high

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.kv_offset + self.kv_bytes

    def encode(self) -> bytes:
        """The header: always the same bytes for the same entry."""
        ids_bytes = 4 * self.high
        said = {
            "__metadata__": {
                "schema": SCHEMA,
                "identity": self.identity,
                "root": self.root,
                "low": str(self.low),
                "high": str(self.high),
                "xxh3_128": self.checksum,
            },
            "token_ids": {"dtype": "U32", "shape": [self.high], "data_offsets": [0, ids_bytes]},
            "kv": {
                "dtype": DTYPES[self.dtype][0],
                "shape": list(self.kv_shape),
                "data_offsets": [ids_bytes, ids_bytes + self.kv_bytes],
            },
        }
        text = json.dumps(said, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text) + ids_bytes) % _ALIGNMENT)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_head(file: int) -> tuple[Head, TokenIds]:
    """Head and token ids [high] of an open file. Raises BadEntry, OSError.

    A header is either byte for byte what we would write, with the size that follows from it, or
    bad: so nothing in it needs to be looked at twice.
    """
    state = os.fstat(file)
    if not stat.S_ISREG(state.st_mode):
        raise BadEntry("it is not a file")
    begin = os.pread(file, _FIRST_READ, 0)
    length = int.from_bytes(begin[:_LENGTH_BYTES], "little")
    if not 0 < length <= _LONGEST_HEADER:
        raise BadEntry("its header is not one of ours")
    if _LENGTH_BYTES + length > len(begin):
        begin += os.pread(file, _LENGTH_BYTES + length - len(begin), len(begin))
    head = _parse(begin[_LENGTH_BYTES : _LENGTH_BYTES + length])
    ids_at = _LENGTH_BYTES + length
    if begin[:ids_at] != head.encode():
        raise BadEntry("its header is not one of ours")
    if state.st_size != head.file_bytes:
        raise BadEntry("it is longer or shorter than its header says")
    missing = ids_at + 4 * head.high - len(begin)
    if missing > 0:
        begin += os.pread(file, missing, len(begin))
    if len(begin) < ids_at + 4 * head.high:
        raise BadEntry("it ends early")
    return head, np.frombuffer(begin, "<u4", head.high, ids_at)


def _parse(text: bytes) -> Head:
    """Takes what is needed; the caller compares the rest. Raises BadEntry."""
    try:
        said: dict[str, Any] = json.loads(text)
        meta, kv = said["__metadata__"], said["kv"]
        layers, _, kv_heads, _, head_dim = (_size(n) for n in kv["shape"])
        head = Head(
            identity=_digest(meta["identity"]),
            root=_digest(meta["root"]),
            low=int(meta["low"]),
            high=_size(int(meta["high"])),
            dtype=_NAMES[kv["dtype"]],
            shape=(layers, kv_heads, head_dim),
            checksum=str(meta["xxh3_128"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadEntry("its header is not one of ours") from error
    if not 0 <= head.low < head.high:
        raise BadEntry("its positions are impossible")
    return head


def _size(number: Any) -> int:
    if type(number) is not int or not 0 < number < 2**31:
        raise ValueError
    return number


def _digest(text: Any) -> str:
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError
    return text
