"""Which nodes of a tree get a KV range of their own. Knows no rows, only how many are below."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.radix_tree import RadixTree


def choose_groups(
    tree: RadixTree, sequences_below: NDArray[np.int64], min_prefix_tokens: int, break_even: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """By node: is it a group node; where does the one above it end; the deepest one down to it.

    From the top, one level of nodes with company after the other; the others have none below.
    """
    is_group = np.zeros(tree.num_nodes, bool)
    anchor_end = np.zeros(tree.num_nodes, np.int64)
    anchor = np.full(tree.num_nodes, -1, np.int64)
    for nodes in _levels(tree.parent, np.flatnonzero(sequences_below > 1)):
        above = tree.parent[nodes]
        nearest = np.where(above < 0, -1, anchor[above])
        anchor_end[nodes] = np.where(nearest < 0, 0, tree.end[nearest])
        span = tree.end[nodes] - anchor_end[nodes]
        saved = span * (sequences_below[nodes] - 1)
        chosen = (span >= min_prefix_tokens) & (saved >= break_even)
        is_group[nodes] = chosen
        anchor[nodes] = np.where(chosen, nodes, nearest)
    alone = np.flatnonzero(sequences_below <= 1)
    above = tree.parent[alone]
    while len(lonely := np.flatnonzero((above >= 0) & (sequences_below[above] <= 1))):
        above[lonely] = tree.parent[above[lonely]]
    anchor[alone] = np.where(above < 0, -1, anchor[above])
    anchor_end[alone] = np.where(anchor[alone] < 0, 0, tree.end[anchor[alone]])
    return is_group, anchor_end, anchor


def _levels(parent: NDArray[np.int64], nodes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """`nodes`, whose parents are among them, by the number of nodes above them."""
    index = np.full(len(parent) + 1, -1, np.int64)  # the last one stands for "no parent"
    index[nodes] = np.arange(len(nodes))
    above = index[parent[nodes]]
    level = (above >= 0).astype(np.int64)
    while len(todo := np.flatnonzero(above >= 0)):
        over = above[todo]
        level[todo], above[todo] = level[todo] + level[over], above[over]
    in_order = np.argsort(level, kind="stable")
    return np.split(nodes[in_order], np.cumsum(np.bincount(level))[:-1])
