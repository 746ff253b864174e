"""Random trees of spans, the rules of a layer and its tensors: what every kernel is tried on.

```
 node  [past .......|fresh]      a node's last `fresh` tokens are queries of this forward;
          node  [past ..|fresh]  all queries at or below it get one span over all of its slots
```

A decoding row is a leaf with one fresh token, a prefill piece one with several.
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
    """KVSpans over `positions` [N] and an arena of `capacity` slots, some of which nobody owns."""

    spans: KVSpans
    positions: NDArray[np.int64]
    capacity: int


@dataclass(frozen=True)
class Layer:
    """query [N, Hq, d]; keys, values [Hkv, capacity, d], all views of larger tensors."""

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
