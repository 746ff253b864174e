"""The plan of a whole job, made before the device is touched. Knows nothing about text or tensors.

From input rows to device work:

```
 rows ──(same prompt, same parameters, greedy)──► sequences ──(same token ids)──► prompts ──► tree
```

A *sequence* is what the engine runs once; every row points at the sequence that answers it. A row
that asks for several samples has as many sequences, side by side, and points at the first. A
*group node* is a node below which at least two sequences lie and whose span (its edge plus the
short edges just above it) has `min_prefix_tokens` or more: it gets a KV range of its own that all
rows below attend to. Shorter shared edges are computed once too, and then copied (ARCHITECTURE.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.conversations import ConversationPlan
from pipeline.plan.documents import DocumentPlan
from pipeline.plan.group_nodes import choose_groups
from pipeline.plan.radix_tree import RadixTree, build_tree
from pipeline.plan.scores import ScorePlan
from pipeline.plan.sorting import SORT_BYTES, sort_rows
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

Names = Sequence[str] | pl.Series
"""Row ids, packed where there are many."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """What the engine runs, in depth-first order of the tree. All arrays [sequences].

    `prompt`: int64, ascending, the distinct prompt; `params`: int64 index into `Plan.params`;
    `row`: int64, the table row that it answers first; `noise_key`: uint64, for sampling; `sample`:
    int32, which one of the row's it is, from 0 on.
    """

    prompt: NDArray[np.int64]
    params: NDArray[np.int64]
    row: NDArray[np.int64]
    noise_key: NDArray[np.uint64]
    sample: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tree, sequences, and what each row gets out of them.

    By node (int64): `sequence_lo`, `sequence_hi` (sequences below, half open), `anchor_end`
    (prompt position up to which the nearest group node *above* covers), `is_group` (bool).
    By row of the token table (int64): `sequence_of_row` (-1: cannot run), `reuse_depth`,
    `group_of_row` (deepest group node on the row's path, -1: none).
    `documents`: what an engine computes instead where documents are reused at any position; the
    tree is that of the whole prompts all the same, but depth and group of a row are those of its
    documents, see `document_rows.py`. `conversations`: where a sequence has more turns than one;
    `scores`: what is read of logits, where nothing is generated.
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
    documents: DocumentPlan | None = None
    conversations: ConversationPlan | None = None
    scores: ScorePlan | None = None

    def prompt_token_ids(self, sequence: int) -> NDArray[np.unsignedinteger]:
        return self.table[int(self.sequences.row[sequence])]

    def num_turns(self, sequence: int) -> int:
        """Answers that a sequence gives, one after the other."""
        return 1 if self.conversations is None else len(self.conversations.turns(sequence))

    def row_of(self, sequence: int, turn: int = 0) -> int:
        """The table row that a turn of a sequence answers first."""
        of, place = self._turn(sequence, turn)
        return int(of.row[place])

    def params_of(self, sequence: int, turn: int = 0) -> SamplingParams:
        """How a turn of a sequence is continued."""
        of, place = self._turn(sequence, turn)
        return self.params[int(of.params[place])]

    def noise_key_of(self, sequence: int, turn: int = 0) -> int:
        """For the sampling of a turn of a sequence."""
        of, place = self._turn(sequence, turn)
        return int(of.noise_key[place])

    def _turn(self, sequence: int, turn: int) -> tuple[Sequences | ConversationPlan, int]:
        turns = self.conversations
        if turns is None:
            return self.sequences, sequence
        return turns, int(turns.bounds[sequence]) + turn

    @property
    def whole_rows(self) -> NDArray[np.int64]:
        """Rows that run and whose prompts are in the tree, ascending: all but later turns."""
        if self.conversations is None:
            return np.flatnonzero(self.sequence_of_row >= 0)
        return np.sort(self.sequences.row)

    def count_below(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of `sequences` lie below each node: [nodes] int64."""
        chosen = np.zeros(len(self.sequences) + 1, np.int64)
        chosen[sequences + 1] = 1
        before = np.cumsum(chosen)
        return before[self.sequence_hi] - before[self.sequence_lo]

    def tokens_to_compute(self, sequences: NDArray[np.int64]) -> int:
        """Prompt tokens that are computed where these sequences run and no other."""
        if self.documents is not None:
            return self.documents.tokens_to_compute(sequences)
        first = int(self.tree.edge_lengths[self.count_below(sequences) > 0].sum())
        return first + int(self.added_tokens[sequences].sum())

    @property
    def added_tokens(self) -> NDArray[np.int64]:
        """[sequences] tokens that the later turns of each compute, where no answer ends with the
        token that the next turn begins with."""
        turns = self.conversations
        if turns is None:
            return np.zeros(len(self.sequences), np.int64)
        added = self.table.lengths[turns.row] + 1
        added[turns.bounds[:-1]] = 0
        return turns.totals(added)

    @property
    def answer_tokens(self) -> NDArray[np.int64]:
        """[sequences] the most tokens that each may generate, in all its turns."""
        if self.scores is not None:
            return np.zeros(len(self.sequences), np.int64)
        turns = self.conversations
        if turns is None:
            return self.max_new_tokens
        return turns.totals(self._new_tokens[turns.params])

    @property
    def evicts(self) -> bool:
        """Whether some of a history may be given up."""
        return self.conversations is not None and self.conversations.eviction.evictor != "none"

    @cached_property
    def most_tokens(self) -> NDArray[np.int64]:
        """[sequences] tokens that each has KV of at its end, or at once where some must go."""
        turns = self.conversations
        if turns is None:
            first: NDArray[np.int64] = self.prompt_lengths + self.max_new_tokens - 1
            return first
        return turns.most_tokens(self.table.lengths[turns.row], self.params)

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """[sequences] prompt tokens of each sequence."""
        return self.table.lengths[self.sequences.row]

    @property
    def max_new_tokens(self) -> NDArray[np.int64]:
        """[sequences] the most tokens that each sequence may generate, in its first turn."""
        return self._new_tokens[self.sequences.params]

    @property
    def _new_tokens(self) -> NDArray[np.int64]:
        return np.array([p.max_new_tokens for p in self.params], np.int64)


def noise_key(seed: int, row_id: str, sample: int = 0) -> int:
    """64 bits that stand for (seed, row id, sample): batch order and resume cannot change them."""
    salt = sample.to_bytes(8, "little")  # of zeros: as if there were none
    digest = hashlib.blake2b(f"{seed}\x1f{row_id}".encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little")


def build_plan(
    table: TokenTable,
    ids: Names,
    params: tuple[SamplingParams, ...],
    params_of_row: NDArray[np.integer],
    tenant: NDArray[np.integer] | None = None,
    min_prefix_tokens: int = 16,
    sort_bytes: int = SORT_BYTES,
    kind_of_row: NDArray[np.int64] | None = None,
) -> Plan:
    """Plan the rows of `table`; empty rows are left out (`sequence_of_row == -1`).

    `params_of_row`: [rows] index into `params`; `tenant`: [rows] small non-negative numbers;
    `sort_bytes`: see `sort_rows`, it changes nothing but the memory taken; `kind_of_row`: [rows]
    rows of two kinds never get one answer.
    """
    tenants = np.zeros(len(table), np.int64) if tenant is None else tenant.astype(np.int64)
    order, shared = rows = sort_rows(table, tenants, sort_bytes)
    lengths = table.lengths[order]
    is_new = rows.is_new(lengths)
    prompt = np.cumsum(is_new) - 1
    tree = build_tree(lengths[is_new], shared[is_new], order[is_new])
    sequences, sequence_of_row = _make_sequences(
        order, prompt, ids, params, params_of_row, kind_of_row
    )
    low = np.searchsorted(sequences.prompt, tree.prompt_lo)
    high = np.searchsorted(sequences.prompt, tree.prompt_hi)
    is_group, anchor_end, anchor = choose_groups(tree, high - low, min_prefix_tokens, 0.0)
    first_row = np.append(np.flatnonzero(is_new), len(order))
    has_company = first_row[tree.prompt_hi] - first_row[tree.prompt_lo] > 1
    shared_end = np.where(has_company, tree.end, tree.start)  # the parent always has company
    reuse_depth = np.zeros(len(table), np.int64)
    group_of_row = np.full(len(table), -1, np.int64)
    terminal = tree.terminal[prompt]
    reuse_depth[order] = shared_end[terminal]
    group_of_row[order] = anchor[terminal]
    params = tuple(replace(p, n=1) if p.n > 1 else p for p in params)
    return Plan(
        table, params, tree, sequences, low, high, anchor_end, is_group,
        sequence_of_row, reuse_depth, group_of_row,
    )  # fmt: skip


def cut_by_cost(plan: Plan, sequences_below: NDArray[np.int64], break_even: float) -> Plan:
    """The same plan with group nodes where sharing a span in decode pays on a device.

    `sequences_below`: [nodes] that will run; `break_even`: least span x (sequences below - 1), in
    tokens, see `engine/sharing_cost.py`. What rows report of their groups stays as planned.
    """
    is_group, anchor_end, _ = choose_groups(plan.tree, sequences_below, 1, break_even)
    return replace(plan, is_group=is_group, anchor_end=anchor_end)


def _make_sequences(
    order: NDArray[np.int64],
    prompt: NDArray[np.int64],
    ids: Names,
    params: tuple[SamplingParams, ...],
    params_of_row: NDArray[np.integer],
    kind_of_row: NDArray[np.int64] | None,
) -> tuple[Sequences, NDArray[np.int64]]:
    """Greedy rows with equal prompt, parameters and kind become one sequence; sampled rows never
    do."""
    greedy = np.array([p.is_greedy for p in params], bool)
    chosen = params_of_row[order].astype(np.int64)
    kind = np.zeros(len(order), np.int64) if kind_of_row is None else kind_of_row[order]
    if len(params) > 1 or kind_of_row is not None:  # in order of (prompt, row) already
        by_params = np.lexsort((order, kind, chosen, prompt))
        order, prompt = order[by_params], prompt[by_params]
        chosen, kind = chosen[by_params], kind[by_params]
    is_head = np.ones(len(order), bool)
    is_same = (prompt[1:] == prompt[:-1]) & (chosen[1:] == chosen[:-1]) & (kind[1:] == kind[:-1])
    is_head[1:] = ~(is_same & greedy[chosen[1:]])
    sequence_of_row = np.full(len(params_of_row), -1, np.int64)
    heads = np.flatnonzero(is_head)
    samples = np.array([p.n for p in params], np.int64)[chosen[heads]]
    first = np.cumsum(samples) - samples
    sequence_of_row[order] = first[np.cumsum(is_head) - 1]
    sample = np.arange(samples.sum()) - np.repeat(first, samples)
    heads = np.repeat(heads, samples)
    row, head_params = order[heads], chosen[heads]
    keys = np.zeros(len(row), np.uint64)
    for index in np.flatnonzero(~greedy[head_params]).tolist():
        seed, name = params[head_params[index]].seed, ids[int(row[index])]
        keys[index] = noise_key(seed, name, int(sample[index]))
    sequences = Sequences(prompt[heads], head_params, row, keys, sample.astype(np.int32))
    return sequences, sequence_of_row
