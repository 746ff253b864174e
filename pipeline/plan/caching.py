"""What a prefix cache without a plan would save on the same rows. Knows nothing about text."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from pipeline.plan.conversation_figures import histories
from pipeline.plan.plan import Plan

MOST_ROWS = 100_000
"""Rows that are followed through a cache; of a longer file the first so many."""


def computed_by_blocks(plan: Plan, block_tokens: int) -> int:
    """Prompt tokens computed where only whole blocks are shared, in a cache without a limit.

    That is vLLM's and transformers' automatic prefix caching at its best: a row finds every block
    that an earlier row has computed with all before it, and computes the rest of its last block. A
    node holds the blocks that end on its edge. A later turn of a conversation finds the whole
    blocks of what was said before, answers as well, each as long as it may be.
    """
    tree = plan.tree
    blocks = int((tree.end // block_tokens - tree.start // block_tokens).sum())
    lengths = plan.table.lengths[plan.whole_rows]
    later = _later_turns_by_blocks(plan, block_tokens)
    return block_tokens * blocks + int((lengths % block_tokens).sum()) + later


def _later_turns_by_blocks(plan: Plan, block_tokens: int) -> int:
    turns = plan.conversations
    if turns is None:
        return 0
    prompts, _ = histories(plan, turns)
    # The last token of the answer before is fed with this turn.
    before = np.maximum(prompts - plan.table.lengths[turns.row] - 1, 0)
    found = before // block_tokens * block_tokens
    needed = prompts - found
    needed[turns.bounds[:-1]] = 0  # of first turns the tree has told
    return int(needed.sum())


def computed_in_given_order(plan: Plan, capacity_tokens: int) -> tuple[int, int]:
    """(tokens computed, prompt tokens) of rows in file order, at most `MOST_ROWS` of them; later
    turns of conversations aside.

    The cache holds whole nodes and lets go of those unused for longest, a node before those above
    it; rows come one after the other.
    """
    runs = plan.whole_rows[:MOST_ROWS]
    prompts = plan.sequences.prompt[plan.sequence_of_row[runs]]
    edge = plan.tree.edge_lengths
    cached: OrderedDict[int, int] = OrderedDict()
    held = computed = 0
    for terminal in plan.tree.terminal[prompts].tolist():
        for node in reversed(plan.tree.path(terminal)):  # so that those above are newer
            if node not in cached:
                cached[node] = int(edge[node])
                held += cached[node]
                computed += cached[node]
            cached.move_to_end(node)
        while held > capacity_tokens:
            held -= cached.popitem(last=False)[1]
    return computed, int(plan.table.lengths[runs].sum())
