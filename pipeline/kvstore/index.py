"""The tree as one file, so that a store opens in a second. Losing it costs nothing but time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.kvstore.header import SCHEMA
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.tree import Node, PrefixTree
from pipeline.storage.durable import replace_file

_DTYPES = {"roots": "u1", "keys": "u1", "parent": "i8", "low": "i8", "end": "i8", "token_ids": "u4"}


class Row(NamedTuple):
    """An entry. `parent`: its row, or -1 - root where it hangs on a root."""

    key: str
    parent: int
    low: int
    token_ids: TokenIds


class Index(NamedTuple):
    """`roots`: (root, identity); `rows`: parents before what hangs on them."""

    roots: list[tuple[str, str]]
    rows: list[Row]


def write_index(path: Path, tree: PrefixTree, identities: dict[str, str]) -> None:
    """Replace the index. `identities`: of each root. Raises StorageError."""
    used = [root for root in tree.roots.values() if root.children]
    number = {id(root): -1 - place for place, root in enumerate(used)}
    nodes: list[Node] = [child for root in used for child in root.children.values()]
    for node in nodes:
        number[id(node)] = len(number) - len(used)
        nodes += node.children.values()
    ids = [node.token_ids for node in nodes]
    arrays: dict[str, NDArray[Any]] = {
        "roots": _digests([part for root in used for part in (root.key, identities[root.key])]),
        "keys": _digests([node.key for node in nodes]),
        "parent": np.array([number[id(node.parent)] for node in nodes], np.int64),
        "low": np.array([node.low for node in nodes], np.int64),
        "end": np.cumsum([len(part) for part in ids], dtype=np.int64),
        "token_ids": np.concatenate([np.zeros(0, np.uint32), *ids]),
    }
    replace_file(path, save(arrays, {"schema": SCHEMA, "xxh3_128": _checksum(arrays)}))


def read_index(path: Path) -> Index | None:
    """The index, or None where there is none that is whole. The entries are the truth, not this."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, TypeError):
        return None
    expected = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
    if {name: array.dtype for name, array in arrays.items()} != expected:
        return None
    if meta != {"schema": SCHEMA, "xxh3_128": _checksum(arrays)}:
        return None
    roots = _hexadecimal(arrays["roots"])
    ends = [0, *arrays["end"].tolist()]
    ids = [arrays["token_ids"][low:high] for low, high in pairwise(ends)]
    columns = (_hexadecimal(arrays["keys"]), arrays["parent"].tolist(), arrays["low"].tolist(), ids)
    return Index(
        list(zip(roots[::2], roots[1::2], strict=True)),
        [Row(*row) for row in zip(*columns, strict=True)],
    )


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digests(texts: list[str]) -> NDArray[np.uint8]:
    """[n, 32] bytes."""
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 32)


def _hexadecimal(digests: NDArray[np.uint8]) -> list[str]:
    text = digests.tobytes().hex()
    return [text[low : low + 64] for low in range(0, len(text), 64)]
