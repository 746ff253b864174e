"""Rows that are turns of conversations become a plan: one sequence for each conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.conversations import ConversationPlan, Eviction
from pipeline.plan.plan import Names, Plan, noise_key
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams


class Chains(NamedTuple):
    """Conversations whose first turn can run. Turns of conversation c, in order, are the rows
    `row[bounds[c] : bounds[c + 1]]` of the table; of its first prompt, `system_tokens[c]` are the
    system prompt. int64 all."""

    bounds: NDArray[np.int64]
    row: NDArray[np.int64]
    system_tokens: NDArray[np.int64]


def plan_conversations(
    build: Callable[[TokenTable, NDArray[np.int64]], Plan],
    table: TokenTable,
    ids: Names,
    params_of_row: NDArray[np.integer],
    chains: Chains,
    eviction: Eviction,
) -> Plan:
    """`build` is `build_plan` with all but its table and `kind_of_row`; see `ConversationPlan`.
    Depth and group of a later turn are those of its conversation's first prompt, which it has."""
    first = chains.row[chains.bounds[:-1]]
    lengths = np.zeros(len(table), np.int64)
    lengths[first] = table.lengths[first]
    plan = build(replace(table, lengths=lengths), np.arange(len(table)))
    chain_of_row = np.zeros(len(table), np.int64)
    chain_of_row[first] = np.arange(len(first))
    chain = chain_of_row[plan.sequences.row]
    counts = np.diff(chains.bounds)
    order = np.concatenate(
        [np.zeros(0, np.int64)]
        + [np.arange(*chains.bounds[c : c + 2].tolist()) for c in chain.tolist()]
    )
    row, params = chains.row[order], params_of_row[chains.row[order]].astype(np.int64)
    sequence_of_row = np.full(len(table), -1, np.int64)
    sequence_of_row[row] = np.repeat(np.arange(len(chain)), counts[chain])
    conversations = ConversationPlan(
        eviction=eviction,
        bounds=np.append(0, np.cumsum(counts[chain])),
        row=row,
        params=params,
        noise_key=_noise_keys(plan.params, params, ids, row),
        system_tokens=chains.system_tokens[chain],
    )
    begins = np.repeat(plan.sequences.row, counts[chain])  # whose prefix every turn stands on
    reuse_depth, group_of_row = plan.reuse_depth.copy(), plan.group_of_row.copy()
    reuse_depth[row], group_of_row[row] = plan.reuse_depth[begins], plan.group_of_row[begins]
    return replace(
        plan,
        table=table,
        sequence_of_row=sequence_of_row,
        reuse_depth=reuse_depth,
        group_of_row=group_of_row,
        conversations=conversations,
    )


def _noise_keys(
    known: tuple[SamplingParams, ...],
    params: NDArray[np.int64],
    ids: Names,
    row: NDArray[np.int64],
) -> NDArray[np.uint64]:
    greedy = np.array([p.is_greedy for p in known], bool)
    keys = np.zeros(len(row), np.uint64)
    for index in np.flatnonzero(~greedy[params]).tolist():
        keys[index] = noise_key(known[int(params[index])].seed, ids[int(row[index])])
    return keys
