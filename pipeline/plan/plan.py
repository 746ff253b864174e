"""The plan of a whole job, made before the device is touched. Knows nothing about text or tensors.

From input rows to device work:

```
 rows ──(same prompt, same parameters, greedy)──► sequences ──(same token ids)──► prompts ──► tree
```

A *sequence* is what the engine runs once; every row points at the sequence that answers it. A
*group node* is a node below which at least two sequences lie and whose span (its edge plus the
short edges just above it) has `min_prefix_tokens` or more: it gets a KV range of its own that all
rows below attend to. Shorter shared edges are computed once too, and then copied (engine.md §2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.radix_tree import RadixTree, build_tree, sort_prompts
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams


@dataclass(frozen=True, eq=False)
class Sequences:
    """What the engine runs, in depth-first order of the tree. All arrays [sequences].

    `prompt`: int64, ascending, the distinct prompt; `params`: int64 index into `Plan.params`;
    `row`: int64, the table row that it answers first; `noise_key`: uint64, for sampling.
    """

    prompt: NDArray[np.int64]
    params: NDArray[np.int64]
    row: NDArray[np.int64]
    noise_key: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tree, sequences, and what each row gets out of them.

    By node (int64): `sequence_lo`, `sequence_hi` (sequences below, half open), `anchor_end`
    (prompt position up to which the nearest group node *above* covers), `is_group` (bool).
    By row of the token table (int64): `sequence_of_row` (-1: cannot run), `reuse_depth`,
    `group_of_row` (deepest group node on the row's path, -1: none).
    """

    table: TokenTable
    params: tuple[SamplingParams, ...]
    tree: RadixTree
    sequences: Sequences
    sequence_lo: NDArray[np.int64]
    sequence_hi: NDArray[np.int64]
    anchor_end: NDArray[np.int64]
    is_group: NDArray[np.bool_]
    sequence_of_row: NDArray[np.int64]
    reuse_depth: NDArray[np.int64]
    group_of_row: NDArray[np.int64]

    def edge_token_ids(self, node: int) -> NDArray[np.unsignedinteger]:
        """The ids on the edge into `node`: [end - start]."""
        row = self.tree.row_of_prompt[self.tree.prompt_lo[node]]
        return self.table[int(row)][self.tree.start[node] : self.tree.end[node]]

    def prompt_token_ids(self, sequence: int) -> NDArray[np.unsignedinteger]:
        """The whole prompt of a sequence."""
        return self.table[int(self.sequences.row[sequence])]

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """[sequences] prompt tokens of each sequence."""
        return self.table.lengths[self.sequences.row]

    @property
    def max_new_tokens(self) -> NDArray[np.int64]:
        """[sequences] the most tokens that each sequence may generate."""
        by_params = np.array([p.max_new_tokens for p in self.params], np.int64)
        return by_params[self.sequences.params]


def noise_key(seed: int, row_id: str) -> int:
    """64 bits that stand for (seed, row id): batch order and resume cannot change them."""
    digest = hashlib.blake2b(f"{seed}\x1f{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def build_plan(
    table: TokenTable,
    ids: Sequence[str],
    params: tuple[SamplingParams, ...],
    params_of_row: NDArray[np.int64],
    tenant: NDArray[np.int64] | None = None,
    min_prefix_tokens: int = 16,
) -> Plan:
    """Plan the rows of `table`; empty rows are left out (`sequence_of_row == -1`).

    `params_of_row`: [rows] index into `params`; `tenant`: [rows] small non-negative numbers.
    """
    tenant = np.zeros(len(table), np.int64) if tenant is None else tenant
    order, prompt = sort_prompts(table, tenant)
    first = np.flatnonzero(np.diff(prompt, prepend=-1))
    tree = build_tree(table, tenant, order[first])
    sequences, sequence_of_row = _make_sequences(order, prompt, ids, params, params_of_row)
    low = np.searchsorted(sequences.prompt, tree.prompt_lo)
    high = np.searchsorted(sequences.prompt, tree.prompt_hi)
    is_group, anchor_end, anchor = _choose_groups(tree, high - low, min_prefix_tokens, 0.0)
    rows_below = np.searchsorted(prompt, tree.prompt_hi) - np.searchsorted(prompt, tree.prompt_lo)
    shared_end = _deepest(tree, np.where(rows_below > 1, tree.end, 0))
    reuse_depth = np.zeros(len(table), np.int64)
    group_of_row = np.full(len(table), -1, np.int64)
    terminal = tree.terminal[prompt]
    reuse_depth[order] = shared_end[terminal]
    group_of_row[order] = anchor[terminal]
    return Plan(
        table, params, tree, sequences, low, high, anchor_end, is_group,
        sequence_of_row, reuse_depth, group_of_row,
    )  # fmt: skip


def cut_by_cost(plan: Plan, sequences_below: NDArray[np.int64], break_even: float) -> Plan:
    """The same plan with group nodes where sharing a span in decode pays on a device.

    `sequences_below`: [nodes] that will run; `break_even`: least span x (sequences below - 1), in
    tokens, see the engine's cost model. What rows report of their groups stays as planned.
    """
    is_group, anchor_end, _ = _choose_groups(plan.tree, sequences_below, 1, break_even)
    return replace(plan, is_group=is_group, anchor_end=anchor_end)


def _make_sequences(
    order: NDArray[np.int64],
    prompt: NDArray[np.int64],
    ids: Sequence[str],
    params: tuple[SamplingParams, ...],
    params_of_row: NDArray[np.int64],
) -> tuple[Sequences, NDArray[np.int64]]:
    """Greedy rows with equal prompt and parameters become one sequence; sampled rows never do."""
    greedy = np.array([p.is_greedy for p in params], bool)[params_of_row[order]]
    distinct = np.where(greedy, -1, order)
    rows = pl.DataFrame({"prompt": prompt, "params": params_of_row[order], "distinct": distinct})
    rows = rows.with_columns(row=order).sort("prompt", "params", "distinct", "row")
    same = rows.select(pl.struct("prompt", "params", "distinct").rle_id()).to_series()
    number = same.to_numpy().astype(np.int64)
    sequence_of_row = np.full(len(params_of_row), -1, np.int64)
    sequence_of_row[rows["row"].to_numpy()] = number
    heads = rows[np.flatnonzero(np.diff(number, prepend=-1))]
    row = heads["row"].to_numpy()
    keys = [
        0 if params[p].is_greedy else noise_key(params[p].seed, ids[r])
        for r, p in zip(row.tolist(), heads["params"].to_list(), strict=True)
    ]
    sequences = Sequences(
        heads["prompt"].to_numpy(), heads["params"].to_numpy(), row, np.array(keys, np.uint64)
    )
    return sequences, sequence_of_row


def _choose_groups(
    tree: RadixTree,
    sequences_below: NDArray[np.int64],
    min_prefix_tokens: int,
    break_even: float,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """By node: is it a group node; where does the one above it end; the deepest one down to it."""
    is_group = np.zeros(tree.num_nodes, bool)
    anchor_end = np.zeros(tree.num_nodes, np.int64)
    anchor = np.full(tree.num_nodes, -1, np.int64)
    for node in range(tree.num_nodes):
        above = int(tree.parent[node])
        nearest = int(anchor[above]) if above >= 0 else -1
        anchor_end[node] = tree.end[nearest] if nearest >= 0 else 0
        span = tree.end[node] - anchor_end[node]
        saved = span * (sequences_below[node] - 1)
        is_group[node] = saved > 0 and span >= min_prefix_tokens and saved >= break_even
        anchor[node] = node if is_group[node] else nearest
    return is_group, anchor_end, anchor


def _deepest(tree: RadixTree, value: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest value on the path of each node: [nodes]. Parents come first: one pass."""
    best = value.copy()
    for node, above in enumerate(tree.parent.tolist()):
        if above >= 0 and best[above] > best[node]:
            best[node] = best[above]
    return best
