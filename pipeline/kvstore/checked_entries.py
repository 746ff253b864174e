"""Entries as they are read: each file is checked once per process. Knows no budget and no index."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.kvstore.entry import MappedEntry, check_entry, map_entry
from pipeline.kvstore.header import BadEntry
from pipeline.kvstore.identity import Identity, entry_key
from pipeline.kvstore.tree import Node, full_ids, root_of


class CheckedEntries:
    """Of one identity."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._digest = identity.digest()
        self._checked: dict[str, int] = {}  # key -> inode of the file

    def read(self, path: Path, node: Node) -> MappedEntry:
        """Map the entry of a node. Raises OSError, BadEntry unless it is what the tree takes it
        for, and whole."""
        entry = map_entry(path)
        if self._checked.get(node.key) != entry.inode:
            self._check_place(entry, node)
            check_entry(entry)
            self._checked[node.key] = entry.inode
        return entry

    def _check_place(self, entry: MappedEntry, node: Node) -> None:
        head = entry.head
        is_expected = (
            head.identity == self._digest
            and (head.low, head.high) == (node.low, node.high)
            and (head.dtype, head.shape) == (self._identity.dtype, self._identity.layout)
            and entry_key(head.root, entry.token_ids, head.low) == node.key
            and head.root == root_of(node)
            and np.array_equal(entry.token_ids, full_ids(node))
        )
        if not is_expected:
            raise BadEntry("it is another entry than its name says")
