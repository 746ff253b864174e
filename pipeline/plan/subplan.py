"""Part of a plan as a plan: what is left of a job, and what one of several machines has to know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.conversations import ConversationPlan
from pipeline.plan.plan import Plan, Sequences
from pipeline.plan.radix_tree import RadixTree
from pipeline.plan.scores import ScorePlan


def only(plan: Plan, sequences: NDArray[np.int64]) -> Plan:
    """The same tree, table and rows; of the sequences these (ascending), numbered anew."""
    if len(sequences) == len(plan.sequences):
        return plan
    numbers = np.full(len(plan.sequences) + 1, -1, np.int64)  # the last one: of rows without any
    numbers[sequences] = np.arange(len(sequences))
    return replace(
        plan,
        sequences=_take(plan.sequences, sequences),
        sequence_lo=np.searchsorted(sequences, plan.sequence_lo),
        sequence_hi=np.searchsorted(sequences, plan.sequence_hi),
        sequence_of_row=numbers[plan.sequence_of_row],
        documents=None if plan.documents is None else plan.documents.only(sequences),
        conversations=None if plan.conversations is None else plan.conversations.only(sequences),
        scores=None if plan.scores is None else plan.scores.only(sequences),
    )


def carve(plan: Plan, sequences: NDArray[np.int64]) -> Plan:
    """A plan that holds these sequences (ascending, at least one) and the tokens they need.

    Nodes are the plan's own, so an engine does with it what it would do with the whole plan and
    these sequences. The rows of its table are its distinct prompts, then what later turns add; they
    tell nothing of reuse.
    """
    prompts, prompt = np.unique(plan.sequences.prompt[sequences], return_inverse=True)
    low, high = plan.sequence_lo, plan.sequence_hi
    nodes = _nodes_above(plan, sequences)
    tree = plan.tree
    above = tree.parent[nodes]
    first = np.searchsorted(prompt, np.arange(len(prompts)))
    rows = plan.sequences.row[sequences[first]]
    number = np.arange(len(prompts))
    sequence_of_row, conversations = first, None
    if plan.conversations is not None:
        conversations, added = _carve_turns(plan.conversations, sequences, prompt, len(prompts))
        rows = np.concatenate([rows, added])
        later = conversations.later_turns(np.arange(len(sequences)))
        of_turn = np.repeat(np.arange(len(sequences)), np.diff(conversations.bounds))
        sequence_of_row = np.concatenate([first, of_turn[later]])
    return Plan(
        plan.table.take(rows),
        plan.params,
        RadixTree(
            parent=np.where(above < 0, -1, np.searchsorted(nodes, above)),
            start=tree.start[nodes],
            end=tree.end[nodes],
            prompt_lo=np.searchsorted(prompts, tree.prompt_lo[nodes]),
            prompt_hi=np.searchsorted(prompts, tree.prompt_hi[nodes]),
            terminal=np.searchsorted(nodes, tree.terminal[prompts]),
            row_of_prompt=number,
        ),
        replace(_take(plan.sequences, sequences), prompt=prompt, row=prompt),
        sequence_lo=np.searchsorted(sequences, low[nodes]),
        sequence_hi=np.searchsorted(sequences, high[nodes]),
        anchor_end=plan.anchor_end[nodes],
        is_group=plan.is_group[nodes],
        sequence_of_row=sequence_of_row,
        reuse_depth=np.zeros(len(rows), np.int64),
        group_of_row=np.full(len(rows), -1, np.int64),
        conversations=conversations,
        scores=None if plan.scores is None else _carve_scores(plan.scores, sequences, nodes),
    )


def _carve_scores(
    scores: ScorePlan, sequences: NDArray[np.int64], nodes: NDArray[np.int64]
) -> ScorePlan:
    """What is read for `sequences`, of whose nodes these are all."""
    ours = scores.only(sequences)
    return replace(ours, point_node=np.searchsorted(nodes, ours.point_node))


def _carve_turns(
    turns: ConversationPlan,
    sequences: NDArray[np.int64],
    prompt: NDArray[np.int64],
    num_prompts: int,
) -> tuple[ConversationPlan, NDArray[np.int64]]:
    """The turns of `sequences`, whose first rows are `prompt` and whose later ones come behind all
    prompts; and these in the whole plan's table."""
    ours = turns.only(sequences)
    later = ours.later_turns(np.arange(len(sequences)))
    row = np.zeros(len(ours.row), np.int64)
    row[ours.bounds[:-1]] = prompt
    row[later] = num_prompts + np.arange(len(later))
    return replace(ours, row=row), ours.row[later]


def prefill_tokens(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Prompt tokens that a machine computes if it runs these sequences and no other."""
    return plan.tokens_to_compute(sequences)


def _nodes_above(plan: Plan, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending nodes with some of `sequences` below. Does not look at the whole tree.

    Nodes come in depth-first order, so those that begin with one of the range of sequences lie
    side by side; what is missing are nodes that begin before it, all on the path to its first.
    """
    low, high = plan.sequence_lo, plan.sequence_hi
    first = int(np.searchsorted(low, sequences[0], side="left"))
    stop = int(np.searchsorted(low, sequences[-1], side="right"))
    path = plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequences[0]]]))
    nodes = np.array([node for node in path if node < first] + [*range(first, stop)], np.int64)
    counts = np.searchsorted(sequences, high[nodes]) - np.searchsorted(sequences, low[nodes])
    return nodes[counts > 0]


def _take(sequences: Sequences, chosen: NDArray[np.int64]) -> Sequences:
    return Sequences(
        sequences.prompt[chosen],
        sequences.params[chosen],
        sequences.row[chosen],
        sequences.noise_key[chosen],
        sequences.sample[chosen],
    )
