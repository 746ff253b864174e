"""The plan cut into sets of whole groups of like cost, so that N machines need only the plan.

A sequence's cost is what it adds when the sequences before it have run: the edges that it needs
first, and its new tokens. A group, that is all sequences below one node at the top, stays together
unless it costs more than a shard's fair share. Then its subtrees are the groups, if their prefix is
so short that every shard may compute it; else it is cut into as few runs of whole subtrees as will
do, and each run pays for the prefix above it again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan

_SHORT = 50  # a prefix is short if all shards together compute it for so small a part of the job


@dataclass(frozen=True)
class Shard:
    """`sequences`: ascending; `cost`: tokens that it computes, prompt and new."""

    sequences: NDArray[np.int64]
    cost: int


@dataclass(frozen=True, order=True)
class _Piece:
    """Sequences `[low, high)`."""

    cost: int
    low: int
    high: int


def cut_into_shards(plan: Plan, num_shards: int) -> list[Shard]:
    """`num_shards` shards that tile the plan's sequences; some are empty where there are too few.

    Longest piece first, each to the shard that has least (Graham's LPT rule).
    """
    pieces = _Cutter(plan, num_shards).pieces()
    least = [(0, shard) for shard in range(num_shards)]
    ranges: list[list[NDArray[np.int64]]] = [[] for _ in range(num_shards)]
    for piece in sorted(pieces, key=lambda p: (-p.cost, p.low)):
        cost, shard = heapq.heappop(least)
        ranges[shard].append(np.arange(piece.low, piece.high))
        heapq.heappush(least, (cost + piece.cost, shard))
    nothing = np.zeros(0, np.int64)
    sets = [np.sort(np.concatenate([nothing, *parts])) for parts in ranges]
    return [Shard(sequences, cost_of(plan, sequences)) for sequences in sets]


def cost_of(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Tokens that a machine computes, prompt and new, if it runs these sequences and no other."""
    needed = plan.count_below(sequences) > 0
    return int(plan.tree.edge_lengths[needed].sum() + plan.max_new_tokens[sequences].sum())


class _Cutter:
    """Groups, and those that are too large in parts. What opened groups share is in no cost."""

    def __init__(self, plan: Plan, num_shards: int) -> None:
        self._plan = plan
        self._costs = _Costs(plan)
        total = self._costs.whole(0, len(plan.sequences))
        self._fair = -(-total // num_shards)
        self._short = total // (_SHORT * num_shards)
        self._by_parent = np.argsort(plan.tree.parent, kind="stable")
        self._parents = plan.tree.parent[self._by_parent]

    def pieces(self) -> list[_Piece]:
        """Pieces that tile the plan's sequences."""
        found: list[_Piece] = []
        ahead = [(node, 0) for node in self._children(-1)]
        while ahead:
            node, above = ahead.pop()
            low, high = int(self._plan.sequence_lo[node]), int(self._plan.sequence_hi[node])
            prefix, below = int(self._plan.tree.end[node]), self._children(node)
            is_opened = self._costs.whole(low, high) - above > self._fair and prefix <= self._short
            if is_opened:  # the prompts that end here come first, then those of the children
                ahead += [(child, prefix) for child in below]
                high = min([high, *self._plan.sequence_lo[below].tolist()])
                above = prefix
            found += self._parts(low, high, above)
        return found

    def _parts(self, low: int, high: int, above: int) -> list[_Piece]:
        parts = self._costs.cut(low, high, self._fair + above)
        return [_Piece(part.cost - above, part.low, part.high) for part in parts]

    def _children(self, node: int) -> list[int]:
        """Nodes below `node`; -1: the nodes at the top."""
        low, high = np.searchsorted(self._parents, [node, node + 1])
        children: list[int] = self._by_parent[low:high].tolist()
        return children


class _Costs:
    """What any run of neighbouring sequences costs by itself."""

    def __init__(self, plan: Plan) -> None:
        own = plan.max_new_tokens.copy()
        needed = plan.sequence_hi > plan.sequence_lo
        np.add.at(own, plan.sequence_lo[needed], plan.tree.edge_lengths[needed])
        self._upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
        self._shared = _shared_with_previous(plan)

    def whole(self, low: int, high: int) -> int:
        """Of sequences `[low, high)`, the prefix that the one before shares included."""
        again = int(self._shared[low]) if low < high else 0
        return int(self._upto[high] - self._upto[low]) + again

    def cut(self, low: int, high: int, fair: int) -> list[_Piece]:
        """`[low, high)` in one piece, or in as many as it takes for each to cost about `fair`.

        A cut goes where the fewest tokens are shared, within a fiftieth of a share of its place.
        """
        number = -(-self.whole(low, high) // max(1, fair))
        pieces = []
        for left in range(number, 0, -1):
            if low == high:  # fewer sequences than pieces
                break
            again = int(self._shared[low + 1 : high].min(initial=self.whole(low, high)))
            target = (self.whole(low, high) + (left - 1) * again) // left
            stop = high if left == 1 else self._best_cut(low, high, target)
            pieces.append(_Piece(self.whole(low, stop), low, stop))
            low = stop
        return pieces

    def _best_cut(self, low: int, high: int, target: int) -> int:
        """First sequence of the next piece, where this one costs about `target`."""
        again = int(self._shared[low])
        reach = self._upto[low] + target - again
        least = int(np.searchsorted(self._upto, reach - target // 50, side="left"))
        most = int(np.searchsorted(self._upto, reach + target // 50, side="right"))
        least, most = max(low + 1, min(least, high)), min(max(most, least, low + 2), high)
        if least >= most:
            return least
        return least + int(np.argmin(self._shared[least:most]))


def _shared_with_previous(plan: Plan) -> NDArray[np.int64]:
    """[sequences] prompt tokens that each has in common with the one before it."""
    shared = plan.prompt_lengths.copy()  # of the same prompt: all
    if not len(shared):
        return shared
    is_new = np.append(True, plan.sequences.prompt[1:] != plan.sequences.prompt[:-1])
    first_needed = np.full(len(plan.sequences), np.iinfo(np.int64).max)
    needed = plan.sequence_hi > plan.sequence_lo
    np.minimum.at(first_needed, plan.sequence_lo[needed], plan.tree.start[needed])
    shared[is_new] = first_needed[is_new]
    return shared
