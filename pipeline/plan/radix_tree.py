"""Radix tree over token ids, as arrays. Knows nothing about text, tensors, rows or Parquet.

Sorted distinct prompts and the length of the prefix that neighbours have in common determine the
tree completely, so no node object is ever made: an inner node is a maximal run of neighbours that
share `end` tokens. Example, four prompts in sorted order:

```
 0: a b              node 0  [0,2)  prompts [0,3)   ends prompt 0
 1: a b c            ├─ node 1  [2,3)  prompts [1,2)
 2: a b d e          └─ node 2  [2,4)  prompts [2,3)
 3: x                node 3  [0,1)  prompts [3,4)
```
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RadixTree:
    """Nodes in depth-first order, parents first; prompts in sorted order. All arrays int64.

    Node n covers prompt positions `[start[n], end[n])`, and prompts `[prompt_lo[n], prompt_hi[n])`
    lie below it. `parent[n]` is -1 at the top. `terminal[p]` is the node where prompt p ends;
    `row_of_prompt[p]` a row of the token table that holds its ids.
    """

    parent: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    prompt_lo: NDArray[np.int64]
    prompt_hi: NDArray[np.int64]
    terminal: NDArray[np.int64]
    row_of_prompt: NDArray[np.int64]

    @property
    def num_nodes(self) -> int:
        """Nodes, the empty root not counted."""
        return len(self.parent)

    @property
    def num_prompts(self) -> int:
        return len(self.terminal)

    @property
    def edge_lengths(self) -> NDArray[np.int64]:
        """[nodes] tokens of each node's edge; their sum is U."""
        return self.end - self.start

    @property
    def unique_tokens(self) -> int:
        """U: distinct prompt tokens, hence tokens that must be prefilled."""
        return int(self.edge_lengths.sum())

    def path(self, node: int) -> list[int]:
        """Nodes from the top down to and with `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]


def build_tree(
    lengths: NDArray[np.int64], shared: NDArray[np.int64], row_of_prompt: NDArray[np.int64]
) -> RadixTree:
    """The tree over sorted distinct prompts of `lengths` [prompts].

    `shared[p]`: tokens that prompt p has in common with p - 1, 0 for the first. A node is where a
    prompt ends, or a maximal run of prompts with `end` tokens in common of which none ends there;
    it reaches from the nearest smaller `shared` before it to the nearest after it. O(prompts) in
    memory, O(prompts log prompts) in time, without a loop over them.
    """
    count = len(lengths)
    border = np.append(shared, 0)
    before, after = previous_smaller(shared), next_smaller(shared)
    prompts = np.arange(count)
    follows = np.append(after, count)[np.minimum(prompts + 1, count)]
    terminal_hi = np.where(border[1:] < lengths, prompts + 1, follows)

    shift = int(lengths.max(initial=0)).bit_length()  # (first prompt, end) as one number
    runs = np.flatnonzero((shared > 0) & (lengths[before] != shared))
    branch, chosen = np.unique((before[runs] << shift) | shared[runs], return_index=True)
    branch_lo, branch_hi = before[runs[chosen]], after[runs[chosen]]
    rank_of_branch = np.arange(len(branch)) + branch_lo
    terminal = prompts + np.searchsorted(branch_lo, prompts, side="right")

    num_nodes = count + len(branch)
    low, high, end = (np.empty(num_nodes, np.int64) for _ in range(3))
    low[terminal], high[terminal], end[terminal] = prompts, terminal_hi, lengths
    low[rank_of_branch], high[rank_of_branch] = branch_lo, branch_hi
    end[rank_of_branch] = shared[runs[chosen]]

    start = np.maximum(border[low], border[high])
    parent = np.full(num_nodes, -1, np.int64)
    inner = np.flatnonzero(start)
    above = before[np.where(border[low[inner]] == start[inner], low[inner], high[inner])]
    ends_there = lengths[above] == start[inner]
    index = np.searchsorted(branch, (above << shift) | start[inner])
    ranks = np.append(rank_of_branch, -1)
    parent[inner] = np.where(ends_there, terminal[above], ranks[index])
    return RadixTree(parent, start, end, low, high, terminal, row_of_prompt)


def previous_smaller(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] the nearest j < i with `values[j] < values[i]`; -1 where `values[i]` or nothing is 0.

    Up a tree of minima over blocks of 1, 2, 4, ... to the first block on the left that has a
    smaller one, and down again to its last: O(n log n), all values side by side.
    """
    levels = [values]
    while len(levels[-1]) > 1:
        row = levels[-1]
        row = row if len(row) % 2 == 0 else np.append(row, np.iinfo(np.int64).max)
        levels.append(np.minimum(row[::2], row[1::2]))
    nearest = np.full(len(values), -1, np.int64)
    todo = np.flatnonzero(values)
    block = todo.copy()
    for depth, row in enumerate(levels):
        is_found = (block % 2 == 1) & (row[block - 1] < values[todo])
        found, index = todo[is_found], block[is_found] - 1
        for lower in reversed(levels[:depth]):
            right = np.minimum(2 * index + 1, len(lower) - 1)
            index = np.where(lower[right] < values[found], right, 2 * index)
        nearest[found] = index
        todo, block = todo[~is_found], block[~is_found] // 2
        if not len(todo):
            break
    return nearest


def next_smaller(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] the nearest j > i with `values[j] < values[i]`, or n; no meaning where it is 0."""
    last = len(values)
    mirrored = previous_smaller(np.append(0, values[::-1]))[1:]
    return last - mirrored[::-1]
