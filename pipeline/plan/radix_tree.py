"""Radix tree over token ids, as arrays. Knows nothing about text, tensors, rows or Parquet.

Sorted distinct prompts and the length of the prefix that neighbours have in common determine the
tree completely, so no node object is ever made: an inner node is a maximal run of neighbours that
share at least `end` tokens. Example, four prompts in sorted order:

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
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.token_table import TokenTable

_COMPARE_TOKENS = 1 << 22  # tokens compared at a time: bounds the memory of common_prefix_lengths


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
        """Distinct prompts."""
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


def sort_prompts(
    table: TokenTable, tenant: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the non-empty rows of `table` by tenant and token ids and number the distinct ones.

    `tenant`: [rows] int64, 0 or more; rows of two tenants never share a prompt or a prefix.
    Returns `(order, prompt)`, both [non-empty rows] int64: `order` holds row numbers, equal
    prompts in row order; `prompt[i]` is the sorted distinct prompt that row `order[i]` holds.
    """
    present = np.flatnonzero(table.lengths)
    # Big-endian bytes sort as the ids themselves do, so the sort runs on whole prompts at once.
    big_endian = table.flat.astype(table.flat.dtype.newbyteorder(">")).view(np.uint8).data
    ends = table.offsets * table.flat.dtype.itemsize
    keys = [bytes(big_endian[ends[row] : ends[row + 1]]) for row in present.tolist()]
    frame = pl.DataFrame({"tenant": tenant[present], "key": pl.Series(keys, dtype=pl.Binary)})
    frame = frame.with_row_index("index").sort("tenant", "key", maintain_order=True)
    order = present[frame["index"].to_numpy()]
    shared = common_prefix_lengths(table, tenant, order)
    lengths = table.lengths[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (shared != lengths[1:]) | (shared != lengths[:-1])
    return order, np.cumsum(is_new) - 1


def common_prefix_lengths(
    table: TokenTable, tenant: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Tokens that rows `order[i]` and `order[i + 1]` share at their beginning: [len(order) - 1].

    0 where their tenants differ.
    """
    limits = np.minimum(table.lengths[order[:-1]], table.lengths[order[1:]])
    limits[tenant[order[:-1]] != tenant[order[1:]]] = 0
    result = np.empty(len(limits), np.int64)
    if not len(limits):
        return result
    upto = np.cumsum(limits)
    cuts = np.unique(np.searchsorted(upto, np.arange(0, upto[-1] + 1, _COMPARE_TOKENS)))
    for low, high in zip(cuts, [*cuts[1:], len(limits)], strict=True):
        result[low:high] = _compare(
            table, order[low:high], order[low + 1 : high + 1], limits[low:high]
        )
    return result


def _compare(
    table: TokenTable, left: NDArray[np.int64], right: NDArray[np.int64], limits: NDArray[np.int64]
) -> NDArray[np.int64]:
    """First position below `limits` where the rows differ, else the limit."""
    first = np.cumsum(limits) - limits
    position = np.arange(limits.sum()) - np.repeat(first, limits)
    differs = table.flat[np.repeat(table.offsets[left], limits) + position]
    differs = differs != table.flat[np.repeat(table.offsets[right], limits) + position]
    found = np.flatnonzero(differs)
    nearest = np.searchsorted(found, first)
    bounded = np.append(found, np.iinfo(np.int64).max)[nearest]
    shared: NDArray[np.int64] = np.minimum(bounded - first, limits)
    return shared


def build_tree(
    table: TokenTable, tenant: NDArray[np.int64], row_of_prompt: NDArray[np.int64]
) -> RadixTree:
    """Build the tree over sorted distinct prompts, given one table row for each of them.

    One pass over the neighbours' common prefix lengths with a stack of open nodes: O(prompts).
    """
    lengths = table.lengths[row_of_prompt]
    shared = common_prefix_lengths(table, tenant, row_of_prompt)
    nodes = _NodeColumns()
    open_nodes: list[int] = []  # path of the prompt just read, top first
    terminal = np.empty(len(lengths), np.int64)
    shared_with_previous = np.concatenate([np.zeros(1, np.int64), shared])[: len(lengths)]
    for prompt, (length, common) in enumerate(
        zip(lengths.tolist(), shared_with_previous.tolist(), strict=True)
    ):
        last = -1
        while open_nodes and nodes.end[open_nodes[-1]] > common:
            last = open_nodes.pop()
            nodes.prompt_hi[last] = prompt
        if last >= 0 and nodes.start[last] < common:
            # The common prefix ends inside `last`: split it, the upper half stays open.
            open_nodes.append(nodes.split(last, common))
        if length > common:
            parent = open_nodes[-1] if open_nodes else -1
            open_nodes.append(nodes.add(parent, common, length, prompt))
        terminal[prompt] = open_nodes[-1]
    for node in open_nodes:
        nodes.prompt_hi[node] = len(lengths)
    return nodes.in_depth_first_order(terminal, row_of_prompt)


class _NodeColumns:
    """Growing columns of the tree, in order of creation."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.start: list[int] = []
        self.end: list[int] = []
        self.prompt_lo: list[int] = []
        self.prompt_hi: list[int] = []

    def add(self, parent: int, start: int, end: int, prompt: int) -> int:
        self.parent.append(parent)
        self.start.append(start)
        self.end.append(end)
        self.prompt_lo.append(prompt)
        self.prompt_hi.append(-1)
        return len(self.parent) - 1

    def split(self, node: int, depth: int) -> int:
        """Put a new node above `node` that covers its edge up to `depth`; return the new one."""
        upper = self.add(self.parent[node], self.start[node], depth, self.prompt_lo[node])
        self.parent[node] = upper
        self.start[node] = depth
        return upper

    def in_depth_first_order(
        self, terminal: NDArray[np.int64], row_of_prompt: NDArray[np.int64]
    ) -> RadixTree:
        parent, start, end, low, high = (
            np.asarray(c, np.int64)
            for c in (self.parent, self.start, self.end, self.prompt_lo, self.prompt_hi)
        )
        order = np.lexsort((start, low))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        parent = np.where(parent[order] < 0, -1, rank[parent[order]])
        return RadixTree(
            parent, start[order], end[order], low[order], high[order], rank[terminal], row_of_prompt
        )
