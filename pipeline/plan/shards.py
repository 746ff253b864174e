"""The plan cut into sets of whole groups of like cost, so that N machines need only the plan.

A sequence's cost is what it adds when the sequences before it have run: the edges that it needs
first, and its new tokens. A group, that is all sequences below one node at the top, stays together
unless it costs more than a shard's fair share. Then its subtrees are the groups, if their prefix is
so short that every shard may compute it; else it is cut into runs of sequences, and each run pays
for the prefix above it again.

How much a run may cost is tried out. At the fair share there are more runs than shards, for each
computes its prefix again; with fewer the largest one takes long. So limits from the fair share on
are tried, and the one is kept with which the last shard ends first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan
from pipeline.plan.subplan import prefill_tokens

_SHORT = 50  # a prefix is short if all shards together compute it for so small a part of the job
_STEP = 1.02  # from one limit to the next
_SLACK = 50  # a cut may move by this part of a limit to where fewer tokens are shared
_GRAIN = 128  # small neighbours are joined up to this part of a fair share: it is fine enough
_FINEST = 32  # and up to this one for workers: a device wants many rows at once

Ranges = NDArray[np.int64]
"""[ranges, 3]: cost without what opened groups share, and sequences `[low, high)`; in order, tiling
the plan's sequences."""


@dataclass(frozen=True)
class Shard:
    """`sequences`: ascending; `cost`: tokens that it computes, prompt and new."""

    sequences: NDArray[np.int64]
    cost: int


def cut_into_shards(plan: Plan, num_shards: int) -> list[Shard]:
    """`num_shards` shards that tile the plan's sequences; some are empty where there are too few.

    Longest piece first, each to the shard that has least (Graham's LPT rule).
    """
    pieces = _best_pieces(plan, Costs(plan), num_shards, num_shards)
    least = [(0, shard) for shard in range(num_shards)]
    ranges: list[list[NDArray[np.int64]]] = [[] for _ in range(num_shards)]
    for piece_cost, low, high in _longest_first(pieces).tolist():
        cost, shard = heapq.heappop(least)
        ranges[shard].append(np.arange(low, high))
        heapq.heappush(least, (cost + piece_cost, shard))
    nothing = np.zeros(0, np.int64)
    sets = [np.sort(np.concatenate([nothing, *parts])) for parts in ranges]
    return [Shard(sequences, cost_of(plan, sequences)) for sequences in sets]


def cut_into_ranges(plan: Plan, costs: Costs, num_workers: int) -> Ranges:
    """The same for workers that fetch one range after the other, the costliest first.

    Small neighbours are joined into ranges of a half, a quarter, ... of a fair share, a round of
    each, so that what comes last is small. `cost` is that of each range by itself.
    """
    fair = -(-costs.whole(0, len(plan.sequences)) // num_workers)
    pieces = _best_pieces(plan, costs, num_workers, num_workers * _FINEST)
    joined = _join(pieces, _halves(fair, num_workers))
    joined[:, 0] = costs.each(joined[:, 1], joined[:, 2])
    return joined


def cost_of(plan: Plan, sequences: NDArray[np.int64]) -> int:
    """Tokens that a machine computes, prompt and new, if it runs these sequences and no other."""
    return prefill_tokens(plan, sequences) + int(plan.answer_tokens[sequences].sum())


def _best_pieces(plan: Plan, costs: Costs, num_shards: int, num_prefixes: int) -> Ranges:
    """Pieces of the limit with which the last of `num_shards` ends first.

    `num_prefixes`: how often a short prefix is computed in all.
    """
    total = costs.whole(0, len(plan.sequences))
    cutter = _Cutter(plan, costs, total // (_SHORT * num_prefixes))
    limit = fair = -(-total // num_shards)
    best, end = np.zeros((0, 3), np.int64), np.inf
    while limit <= min(end, total) or not len(best):
        pieces = _join(cutter.pieces(limit), repeat(fair // _GRAIN))
        pieces_end = _end(pieces, num_shards)
        if pieces_end < end:
            best, end = pieces, pieces_end
        if limit >= total:
            break
        limit = int(limit * _STEP) + 1
    return best


def _end(pieces: Ranges, num_shards: int) -> float:
    """When the last of the shards ends, if each takes the longest piece that is left."""
    ends = [0] * num_shards
    for cost in _longest_first(pieces)[:, 0].tolist():
        heapq.heappush(ends, heapq.heappop(ends) + cost)
    return float(max(ends))


def _longest_first(pieces: Ranges) -> Ranges:
    return pieces[np.lexsort((pieces[:, 1], -pieces[:, 0]))]


def _join(pieces: Ranges, units: Iterator[int]) -> Ranges:
    """Neighbours together as long as they cost at most the next of `units`."""
    upto = np.append(0, np.cumsum(pieces[:, 0]))
    firsts, first = [], 0
    while first < len(pieces):
        firsts.append(first)
        last = int(np.searchsorted(upto, upto[first] + next(units), side="right")) - 1
        first = max(first + 1, last)
    stops = [*firsts[1:], len(pieces)]
    if not firsts:
        return pieces
    ends = np.array(stops, np.int64)
    cost, low = upto[ends] - upto[firsts], pieces[firsts, 1]
    return np.stack([cost, low, pieces[ends - 1, 2]], axis=1)


def _halves(fair: int, num_workers: int) -> Iterator[int]:
    """A half of `fair` for each worker, then a quarter, ..., and small ones for ever."""
    part = 2
    while part < _FINEST:
        yield from [fair // part] * num_workers
        part *= 2
    while True:
        yield fair // _FINEST


class _Cutter:
    """Groups, and those that are too large in parts."""

    def __init__(self, plan: Plan, costs: Costs, short: int) -> None:
        self._plan = plan
        self._costs = costs
        self._short = short
        self._by_parent = np.argsort(plan.tree.parent, kind="stable")
        self._parents = plan.tree.parent[self._by_parent]

    def pieces(self, limit: int) -> Ranges:
        """Pieces that cost at most `limit`, or are a single sequence."""
        plan, found = self._plan, [np.zeros((0, 3), np.int64)]
        ahead = [(self._children(-1), 0)]
        while ahead:
            nodes, above = ahead.pop()
            low, high = plan.sequence_lo[nodes], plan.sequence_hi[nodes]
            costs = self._costs.each(low, high) - above
            fits = costs <= limit
            found.append(np.stack([costs, low, high], axis=1)[fits])
            for node in nodes[~fits].tolist():
                start, stop = int(plan.sequence_lo[node]), int(plan.sequence_hi[node])
                prefix = int(plan.tree.end[node])
                if prefix > self._short:
                    found.append(self._costs.cut(start, stop, limit, above))
                    continue
                below = self._children(node)
                ahead.append((below, prefix))  # behind the prompts that end here
                stop = int(plan.sequence_lo[below].min(initial=stop))
                found.append(self._costs.cut(start, stop, limit, prefix))
        pieces = np.concatenate(found)
        return pieces[np.argsort(pieces[:, 1], kind="stable")]

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
        self.own = np.rint(plan.answer_tokens * decode_weight).astype(np.int64) + plan.added_tokens
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

    def cut(self, low: int, high: int, limit: int, above: int) -> Ranges:
        """`[low, high)` in runs that cost at most `limit`, `above` tokens of prefix not counted.

        A cut goes where the fewest tokens are shared, within a fiftieth of a run from its end.
        """
        pieces = []
        while low < high:
            most = limit + above - int(self.shared[low])
            stop = min(max(self._reach(low, most), low + 1), high)
            if stop < high:
                least = min(max(self._reach(low, most - limit // _SLACK), low + 1), stop)
                sizes = self.shared[least : stop + 1][::-1]  # the last one of equally good ones
                stop -= int(np.argmin(sizes))
            pieces.append((self.whole(low, stop) - above, low, stop))
            low = stop
        return np.array(pieces, np.int64).reshape(-1, 3)

    def _reach(self, low: int, most: int) -> int:
        """The largest `high` for which sequences `[low, high)` add at most `most`."""
        return int(np.searchsorted(self._upto, self._upto[low] + most, side="right")) - 1


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
