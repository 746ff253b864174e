"""Where the tokens of a row lie, asked of one object. Knows positions, no slots.

This one shares prefixes: a node of the plan's tree that several sequences see is a span, and stands
at the same position in all rows below it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan


class SharedPart(NamedTuple):
    """A span that other sequences see as well. All but `key`, which says what it holds, are
    positions: of its first token, of the first that is not a copy, and the one after its last."""

    key: int
    position: int
    start: int
    end: int


class RowLayout(NamedTuple):
    """The shared parts of a row, top first, and the positions of its own as in `SharedPart`."""

    shared: list[SharedPart]
    position: int
    start: int
    end: int


class PrefixLayout:
    """The layout of `sequences` of a plan. By node (int64): `below`, as many of them see it, and
    `ending`, as many end exactly there."""

    def __init__(self, plan: Plan, sequences: NDArray[np.int64]) -> None:
        self._plan = plan
        self._lengths = plan.prompt_lengths
        terminal = plan.tree.terminal[plan.sequences.prompt[sequences]]
        self.below = plan.count_below(sequences)
        self.ending = np.bincount(terminal, minlength=plan.tree.num_nodes)

    def of(self, sequence: int) -> RowLayout:
        """A group node's span begins where the one above it ends, so it has copies of the short
        edges between them; so does the row's own."""
        plan, tree, shared, covered = self._plan, self._plan.tree, [], 0
        for node in tree.path(int(tree.terminal[plan.sequences.prompt[sequence]])):
            if self.below[node] > 1:
                start, end = int(tree.start[node]), int(tree.end[node])
                is_group = bool(plan.is_group[node])
                position = int(plan.anchor_end[node]) if is_group else start
                shared.append(SharedPart(node, position, start, end))
                covered = end if is_group else covered
        start = shared[-1].end if shared else 0
        return RowLayout(shared, covered, start, int(self._lengths[sequence]))


def most_kv_tokens(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Slots that would hold every span and row of the job at the same time: an upper bound."""
    shared = plan.count_below(sequences) > 1
    position = np.where(plan.is_group, plan.anchor_end, plan.tree.start)
    spans = (plan.tree.end - position)[shared].sum()
    rows = plan.prompt_lengths[sequences] + plan.max_new_tokens[sequences] - 1
    return int(spans + rows.sum())
