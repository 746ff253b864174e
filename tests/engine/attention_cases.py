"""Random trees of spans, the rules of a layer and its tensors: what every kernel is tried on.

```
 node  [past .......|fresh]      a node's last `fresh` tokens are queries of this forward;
          node  [past ..|fresh]  all queries at or below it get one span over all of its slots
```

A decoding row is a leaf with one fresh token, a prefill piece one with several. Tokens may also see
documents, each at a position of its own: by views, which follow the tokens' own queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules, KVSpans


@dataclass(frozen=True)
class Tree:
    """KVSpans over `positions` [V] and an arena of `capacity` slots, some of which nobody owns.

    `owner` [V] where there are views.
    """

    spans: KVSpans
    positions: NDArray[np.int64]
    capacity: int
    owner: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Layer:
    """query [V, Hq, d]; keys, values [Hkv, capacity, d], all views of larger tensors."""

    query: Tensor
    keys: Tensor
    values: Tensor


Node = tuple[int, int, int]
"""(0 for a root or 1 + the place of its parent, length, fresh tokens)"""


def build_tree(nodes: list[Node], order: list[int], blind: bool = False) -> Tree:
    """`order` of the nodes in the arena; `blind` adds a query that sees nothing."""
    slots, capacity = {}, 1
    for node in order:
        slots[node] = capacity
        capacity += nodes[node][1] + node % 2
    spans: list[list[int]] = []
    positions: list[int] = []

    def visit(node: int, position: int) -> None:
        _, length, fresh = nodes[node]
        low, end = len(positions), position + length
        positions.extend(range(end - min(fresh, length), end))
        for child in [i for i, other in enumerate(nodes) if other[0] == node + 1]:
            visit(child, end)
        if low < len(positions):
            slot = slots[node]
            spans.append([low, len(positions), slot, slot + length, position])

    for root in [i for i, node in enumerate(nodes) if node[0] == 0]:
        visit(root, 0)
    if blind or not positions:
        positions.append(9)
    table = np.array(spans, np.int64).reshape(-1, 5)
    in_order = np.argsort(table[:, 0], kind="stable")
    return Tree(table[in_order], np.array(positions, np.int64), capacity + 1)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 6, max_length: int = 24) -> Tree:
    """Forests of any depth; nodes of which nothing is asked count as well."""
    count = draw(st.integers(1, max_nodes))
    nodes = [
        (draw(st.integers(0, i)), draw(st.integers(1, max_length)), draw(st.integers(0, 5)))
        for i in range(count)
    ]
    return build_tree(nodes, draw(st.permutations(range(count))), draw(st.booleans()))


@st.composite
def trees_with_documents(draw: st.DrawFn, max_length: int = 24) -> Tree:
    """Tokens of a tree, with up to 8 views each of documents that others see as well.

    Some of those that see a document see its tail alone, and some stand where they see nothing.
    """
    tree = draw(trees(max_nodes=4, max_length=max_length))
    documents = draw(st.lists(st.integers(1, 2 * max_length), min_size=1, max_size=5))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens = len(tree.positions)
    chosen = np.sort(chance.integers(0, len(documents), (tokens, 8)), 1)  # some of them twice
    is_seen = np.arange(8) < chance.integers(0, 9, (tokens, 1))
    spans, owners, positions = [tree.spans], [np.arange(tokens)], [tree.positions]
    low, slot = tokens, tree.capacity
    for document, length in enumerate(documents):
        owner = np.nonzero((chosen == document) & is_seen)[0]
        high = low + len(owner)
        whole = np.sort(chance.integers(low, high + 1, 2)).tolist()  # these see the head as well
        head, first = int(chance.integers(0, length + 1)), int(chance.integers(0, 4))
        spans += [
            np.array([[q_lo, q_hi, slot + begin, slot + end, first + begin]])
            for q_lo, q_hi, begin, end in ((low, high, head, length), (*whole, 0, head))
            if q_lo < q_hi and begin < end
        ]
        owners.append(owner)
        is_after = chance.random(len(owner)) < chance.choice([0.0, 0.7, 1.0])
        at = chance.integers(int(chance.choice([-2, 0, 1])), length + 4, len(owner))
        positions.append(first + at + length * is_after)
        low, slot = high, slot + length + 1
    return Tree(np.concatenate(spans), np.concatenate(positions), slot, np.concatenate(owners))


def with_views(tree: Tree, is_moved: NDArray[np.bool_]) -> Tree:
    """The same, said otherwise: what the spans in question give, their tokens see by views."""
    counts = np.where(is_moved, tree.spans[:, 1] - tree.spans[:, 0], 0)
    ends = len(tree.positions) + np.cumsum(counts)
    spans = tree.spans.copy()
    spans[is_moved, 0], spans[is_moved, 1] = (ends - counts)[is_moved], ends[is_moved]
    seen = [np.arange(*row) for row in tree.spans[is_moved, :2].tolist()]
    owner = np.concatenate([np.arange(len(tree.positions)), *seen])
    return Tree(spans, tree.positions[owner], tree.capacity, owner)


@st.composite
def rules(draw: st.DrawFn, heads: int) -> AttentionRules:
    """Every mixture of window, soft cap and sinks."""
    sinks = torch.linspace(-2, 2, heads) if draw(st.booleans()) else None
    window, softcap = draw(st.sampled_from([0, 0, 1, 7, 30])), draw(st.sampled_from([0.0, 1.5]))
    return AttentionRules(draw(st.sampled_from([0.1, 0.3])), window, softcap, sinks)


def random_layer(
    tree: Tree,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    """`heads` is (query heads, KV heads). Slots without an owner hold NaN: reading one shows."""
    draw = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    query = torch.randn(1, num_heads, len(tree.positions), head_dim, generator=draw) * 2
    arena = torch.randn(2, 2, kv_heads, tree.capacity, head_dim, generator=draw)
    is_owned = torch.zeros(tree.capacity, dtype=torch.bool)
    for _, _, kv_lo, kv_hi, _ in tree.spans.tolist():
        is_owned[kv_lo:kv_hi] = True
    arena[..., ~is_owned, :] = float("nan")
    keys, values = arena[1].to(device, dtype)
    return Layer(query.to(device, dtype)[0].transpose(0, 1), keys, values)
