"""Which prefixes are stored: a radix tree over token ids. Knows nothing about files and tensors.

A node is an entry. It hangs where the longest prefix that its parent's side has of it ends, so
every position of every prefix is there once:

```
 root ── a b c d e  [0, 5)          an entry
             ├── x y  [3, 5)        hangs inside it: its parent is used up to position 3
             └── f  [5, 6)          hangs at its end
```
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from pipeline.kvstore.identity import TokenIds


@dataclass(eq=False, slots=True)
class Node:
    """An entry: `token_ids` are those of its own positions `[low, high)`.

    `size`: bytes of its file. `last_used`: ns since 1970. A root has no parent and no ids.
    """

    key: str
    parent: Node | None
    low: int
    token_ids: TokenIds
    size: int = 0
    last_used: int = 0
    children: dict[tuple[int, int], Node] = field(default_factory=dict)

    @property
    def high(self) -> int:
        """The end of its positions."""
        return self.low + len(self.token_ids)

    @property
    def place(self) -> tuple[int, int]:
        """Its name among its siblings: where it hangs, and its first token id."""
        return self.low, int(self.token_ids[0])


class Walk(NamedTuple):
    """How far a prompt can be followed: `length` tokens, along `nodes` from the top."""

    nodes: tuple[Node, ...]
    length: int

    def pieces(self) -> Iterator[tuple[Node, int, int]]:
        """Each node with the positions `[low, high)` that are taken from it."""
        for node, after in zip_longest(self.nodes, self.nodes[1:]):
            yield node, node.low, self.length if after is None else after.low


class PrefixTree:
    """All entries of a store, below one root for each tenant of each identity."""

    def __init__(self) -> None:
        self.roots: dict[str, Node] = {}
        self.nodes: dict[str, Node] = {}
        self._ages: list[tuple[int, str]] = []  # heap; holds every leaf, perhaps with an older time

    def walk(self, root: str, token_ids: TokenIds) -> Walk:
        """Follow a prompt as far as it is stored."""
        node: Node | None = self.roots.get(root)
        nodes, length = [], 0
        while node is not None:
            length = node.low + common_length(node.token_ids, token_ids[node.low :])
            nodes.append(node)
            if length == len(token_ids):
                break
            node = node.children.get((length, int(token_ids[length])))
        return Walk(tuple(nodes[1:]), length)

    def insert(self, root: str, key: str, token_ids: TokenIds, low: int) -> Node | None:
        """Add the entry of positions `[low, len(token_ids))`; None unless it hangs exactly there.

        It does not where `[0, low)` is not stored, nor where more than that already is.
        """
        walk = self.walk(root, token_ids)
        if walk.length != low:
            return None
        parent = walk.nodes[-1] if walk.nodes else self.root(root)
        return self.attach(parent, key, token_ids[low:], low)

    def root(self, root: str) -> Node:
        """The root of this name, new if need be."""
        if root not in self.roots:
            self.roots[root] = Node(root, None, 0, np.zeros(0, np.uint32))
        return self.roots[root]

    def attach(self, parent: Node, key: str, token_ids: TokenIds, low: int) -> Node | None:
        """Hang an entry of `token_ids` at position `low` of `parent`; None where it cannot."""
        node = Node(key, parent, low, token_ids)
        is_within = parent.low <= low <= parent.high and (low > parent.low or parent.parent is None)
        if not is_within or node.place in parent.children or key in self.nodes:
            return None
        if low < parent.high and parent.token_ids[low - parent.low] == token_ids[0]:
            return None
        parent.children[node.place] = node
        self.nodes[key] = node
        heapq.heappush(self._ages, (0, key))
        return node

    def remove(self, node: Node) -> list[Node]:
        """Take an entry and all below it out of the tree; returns them, parents first."""
        removed = [node]
        for gone in removed:
            removed += gone.children.values()
            self.nodes.pop(gone.key)
        parent = node.parent
        assert parent is not None, "a root is no entry"
        del parent.children[node.place]
        if parent.parent is not None and not parent.children:
            heapq.heappush(self._ages, (parent.last_used, parent.key))
        return removed

    def oldest_leaf(self, spared: Collection[Node] = ()) -> Node | None:
        """The entry, of those that nothing hangs on, that was used the longest ago."""
        kept = []
        try:
            while self._ages:
                age, key = heapq.heappop(self._ages)
                node = self.nodes.get(key)
                if node is None or node.children:
                    continue  # gone, or will be pushed when its last child goes
                if node.last_used > age:
                    heapq.heappush(self._ages, (node.last_used, key))
                    continue
                kept.append((age, key))
                if node not in spared:
                    return node
            return None
        finally:
            for item in kept:
                heapq.heappush(self._ages, item)


def common_length(first: TokenIds, second: TokenIds) -> int:
    """Tokens that both begin with."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    place = int(differs.argmax()) if length else 0
    return place if length and differs[place] else length


def full_ids(node: Node) -> TokenIds:
    """[high] the ids of the whole prefix that an entry ends, from its ancestors and itself."""
    parts = [node.token_ids]
    while node.parent is not None:
        parts.append(node.parent.token_ids[: node.low - node.parent.low])
        node = node.parent
    return np.concatenate(parts[::-1])


def root_of(node: Node) -> str:
    """The name of the root that an entry hangs below."""
    while node.parent is not None:
        node = node.parent
    return node.key
