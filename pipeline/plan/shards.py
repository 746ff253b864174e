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
class Range:
    """Sequences `[low, high)`, and what they cost by themselves or, inside an opened group,
    without what is shared there."""

    cost: int
    low: int
    high: int


def cut_into_shards(plan: Plan, num_shards: int) -> list[Shard]:
    """`num_shards` shards that tile the plan's sequences; some are empty where there are too few.

    Longest piece first, each to the shard that has least (Graham's LPT rule).
    """
    pieces = _Cutter(plan, Costs(plan), num_shards).pieces()
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


def cut_into_ranges(plan: Plan, costs: Costs, num_shards: int, unit: int) -> list[Range]:
    """The same pieces, where small neighbours are joined as long as they cost at most `unit`.

    They tile the plan's sequences, in order; `cost` is that of each by itself.
    """
    pieces = _Cutter(plan, costs, num_shards).pieces()
    low = np.array(sorted(piece.low for piece in pieces), np.int64)
    high = np.append(low[1:], len(plan.sequences))
    found, first = [], 0
    while first < len(low):
        start = int(low[first])
        last = int(np.searchsorted(high, costs.reach(start, unit), side="right")) - 1
        stop = int(high[max(first, last)])
        found.append(Range(costs.whole(start, stop), start, stop))
        first = max(first, last) + 1
    return found


class _Cutter:
    """Groups, and those that are too large in parts. What opened groups share is in no cost."""

    def __init__(self, plan: Plan, costs: Costs, num_shards: int) -> None:
        self._plan = plan
        self._costs = costs
        total = self._costs.whole(0, len(plan.sequences))
        self._fair = -(-total // num_shards)
        self._short = total // (_SHORT * num_shards)
        self._by_parent = np.argsort(plan.tree.parent, kind="stable")
        self._parents = plan.tree.parent[self._by_parent]

    def pieces(self) -> list[Range]:
        """Pieces that tile the plan's sequences."""
        found: list[Range] = []
        ahead = [(self._children(-1), 0)]
        while ahead:
            nodes, above = ahead.pop()
            low, high = self._plan.sequence_lo[nodes], self._plan.sequence_hi[nodes]
            costs = self._costs.each(low, high) - above
            fits = costs <= self._fair
            rest = (costs[fits].tolist(), low[fits].tolist(), high[fits].tolist())
            found += map(Range, *rest)
            for node in nodes[~fits].tolist():
                found += self._open_or_cut(node, above, ahead)
        return found

    def _open_or_cut(
        self, node: int, above: int, ahead: list[tuple[NDArray[np.int64], int]]
    ) -> list[Range]:
        """Pieces of a group that is too large; where it is opened, its children go to `ahead`."""
        low, high = int(self._plan.sequence_lo[node]), int(self._plan.sequence_hi[node])
        prefix = int(self._plan.tree.end[node])
        if prefix <= self._short:  # the prompts that end here come first, then the children's
            below = self._children(node)
            ahead.append((below, prefix))
            high = int(self._plan.sequence_lo[below].min(initial=high))
            above = prefix
        parts = self._costs.cut(low, high, self._fair + above)
        return [Range(part.cost - above, part.low, part.high) for part in parts]

    def _children(self, node: int) -> NDArray[np.int64]:
        """Nodes below `node` that have sequences; -1: those at the top."""
        low, high = np.searchsorted(self._parents, [node, node + 1])
        below = self._by_parent[low:high]
        return below[self._plan.sequence_hi[below] > self._plan.sequence_lo[below]]


class Costs:
    """What any run of neighbouring sequences costs by itself, in prefilled tokens.

    `decode_weight`: how many of them a new token costs. `own`: [sequences] what each adds when
    those before it have run; `shared`: [sequences] prompt tokens in common with the one before.
    """

    def __init__(self, plan: Plan, decode_weight: float = 1.0) -> None:
        self.own = np.rint(plan.max_new_tokens * decode_weight).astype(np.int64)
        needed = plan.sequence_hi > plan.sequence_lo
        np.add.at(self.own, plan.sequence_lo[needed], plan.tree.edge_lengths[needed])
        self._upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.own)])
        self.shared = _shared_with_previous(plan)

    def whole(self, low: int, high: int) -> int:
        """Of sequences `[low, high)`, the prefix that the one before shares included."""
        again = int(self.shared[low]) if low < high else 0
        return int(self._upto[high] - self._upto[low]) + again

    def each(self, low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same of many ranges, none of them empty."""
        costs: NDArray[np.int64] = self._upto[high] - self._upto[low] + self.shared[low]
        return costs

    def reach(self, low: int, most: int) -> int:
        """The largest `high` for which `[low, high)` costs at most `most`."""
        budget = self._upto[low] + most - int(self.shared[low])
        return int(np.searchsorted(self._upto, budget, side="right")) - 1

    def cut(self, low: int, high: int, fair: int) -> list[Range]:
        """`[low, high)` in one piece, or in as many as it takes for each to cost about `fair`.

        A cut goes where the fewest tokens are shared, within a fiftieth of a share of its place.
        """
        number = -(-self.whole(low, high) // max(1, fair))
        pieces = []
        for left in range(number, 0, -1):
            if low == high:  # fewer sequences than pieces
                break
            again = int(self.shared[low + 1 : high].min(initial=self.whole(low, high)))
            target = (self.whole(low, high) + (left - 1) * again) // left
            stop = high if left == 1 else self._best_cut(low, high, target)
            pieces.append(Range(self.whole(low, stop), low, stop))
            low = stop
        return pieces

    def _best_cut(self, low: int, high: int, target: int) -> int:
        """First sequence of the next piece, where this one costs about `target`."""
        again = int(self.shared[low])
        reach = self._upto[low] + target - again
        least = int(np.searchsorted(self._upto, reach - target // 50, side="left"))
        most = int(np.searchsorted(self._upto, reach + target // 50, side="right"))
        least, most = max(low + 1, min(least, high)), min(max(most, least, low + 2), high)
        if least >= most:
            return least
        return least + int(np.argmin(self.shared[least:most]))


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
