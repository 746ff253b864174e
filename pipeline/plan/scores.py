"""Scores: which logits of which positions are read, for continuations of known contexts.

```
 request            context | continuation           tokens c1 c2 c3
 prompt of the tree context | c1 c2                  the last token is fed nowhere
 read at            last of context, c1, c2          the log-probability of c1, c2, c3 there
```

A *request* is a context and a continuation. Its prompt is in the tree as any other's, so equal
beginnings are computed once, of continuations too, and two requests of one prompt are one sequence.
A *point* is a position whose logits are read: of a tree node, so that it is read once however many
requests pass it. A *target* is a token whose log-probability is taken at a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.radix_tree import RadixTree
from pipeline.plan.token_table import Ids


@dataclass(frozen=True, eq=False)
class ScorePlan:
    """Arrays int64. Requests are in order of their sequences: those of sequence s are
    `request[bounds[s] : bounds[s + 1]]`, numbers of the caller's requests.

    Points rise by (`point_node`, `point_position`). By token of those requests, end to end and cut
    by `token_bounds`: `target_of_token`, an index into the targets. By target, rising by point:
    `target_point`, `target_id`.
    """

    bounds: NDArray[np.int64]
    request: NDArray[np.int64]
    token_bounds: NDArray[np.int64]
    target_of_token: NDArray[np.int64]
    target_point: NDArray[np.int64]
    target_id: NDArray[np.int64]
    point_node: NDArray[np.int64]
    point_position: NDArray[np.int64]

    def only(self, sequences: NDArray[np.int64]) -> ScorePlan:
        """What is read for these sequences, which are numbered anew; nodes keep their numbers."""
        places, bounds = _ranges(self.bounds[sequences], self.bounds[sequences + 1])
        tokens, token_bounds = _ranges(self.token_bounds[places], self.token_bounds[places + 1])
        targets, target_of_token = np.unique(self.target_of_token[tokens], return_inverse=True)
        points, target_point = np.unique(self.target_point[targets], return_inverse=True)
        return ScorePlan(
            bounds=bounds,
            request=self.request[places],
            token_bounds=token_bounds,
            target_of_token=target_of_token,
            target_point=target_point,
            target_id=self.target_id[targets],
            point_node=self.point_node[points],
            point_position=self.point_position[points],
        )

    @property
    def num_points(self) -> int:
        """Positions at which the model's head must be computed."""
        return len(self.point_node)

    @property
    def num_contexts(self) -> int:
        """Different ones: each ends where the first token of a continuation is read."""
        return len(np.unique(self._first_points))

    @property
    def num_continuations(self) -> int:
        """Different ones, each behind its context."""
        last = self.target_of_token[self.token_bounds[1:] - 1]
        return len(np.unique(self._first_points * len(self.target_id) + last))

    @property
    def _first_points(self) -> NDArray[np.int64]:
        points: NDArray[np.int64] = self.target_point[self.target_of_token[self.token_bounds[:-1]]]
        return points

    @cached_property
    def _targets_of_point(self) -> NDArray[np.int64]:
        bounds: NDArray[np.int64] = np.searchsorted(
            self.target_point, np.arange(self.num_points + 1)
        )
        return bounds

    def points_at(self, node: int, low: int, high: int) -> NDArray[np.int64]:
        """Points of a node at positions `[low, high)`."""
        first, stop = np.searchsorted(self.point_node, [node, node + 1]).tolist()
        at = self.point_position[first:stop]
        return np.arange(*(first + np.searchsorted(at, [low, high])).tolist())

    def first_position(self, node: int, end: int) -> int:
        """Of the first point of a node; `end` where it has none."""
        first = int(np.searchsorted(self.point_node, node))
        has_one = first < self.num_points and self.point_node[first] == node
        return int(self.point_position[first]) if has_one else end

    def targets_at(self, points: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Targets of some points, end to end, and of each the place of its point in `points`."""
        low, high = self._targets_of_point[points], self._targets_of_point[points + 1]
        return _ranges(low, high)[0], np.repeat(np.arange(len(points)), high - low)


def plan_scores(
    tree: RadixTree,
    prompt_of_sequence: NDArray[np.int64],
    sequence_of_request: NDArray[np.int64],
    context_lengths: NDArray[np.int64],
    continuations: tuple[Ids, NDArray[np.int64]],
) -> ScorePlan:
    """`prompt_of_sequence` as in `Sequences`; by request: its sequence (-1: it is left out), tokens
    of its context (at least one), and `continuations`, ids end to end and how many of each."""
    flat, lengths = continuations
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(sequence_of_request, kind="stable")
    order = order[sequence_of_request[order] >= 0]
    sequence, count = sequence_of_request[order], lengths[order]
    bounds = np.searchsorted(sequence, np.arange(len(prompt_of_sequence) + 1))
    token_bounds = np.append(0, np.cumsum(count))
    offset = np.arange(token_bounds[-1]) - np.repeat(token_bounds[:-1], count)
    ids = flat[np.repeat(starts[order], count) + offset].astype(np.int64)
    position = np.repeat(context_lengths[order] - 1, count) + offset
    node = _node_at(tree, np.repeat(tree.terminal[prompt_of_sequence[sequence]], count), position)
    ranked = np.lexsort((ids, position, node))
    is_point = _changes(node[ranked], position[ranked])
    is_target = is_point | _changes(ids[ranked])
    target_of_token = np.empty(len(ids), np.int64)
    target_of_token[ranked] = np.cumsum(is_target) - 1
    heads, firsts = ranked[is_point], ranked[is_target]
    return ScorePlan(
        bounds=bounds,
        request=order,
        token_bounds=token_bounds,
        target_of_token=target_of_token,
        target_point=(np.cumsum(is_point) - 1)[is_target],
        target_id=ids[firsts],
        point_node=node[heads],
        point_position=position[heads],
    )


def _node_at(
    tree: RadixTree, node: NDArray[np.int64], position: NDArray[np.int64]
) -> NDArray[np.int64]:
    """From each of `node` upwards, the one that holds `position`."""
    node = node.copy()
    while len(below := np.flatnonzero(tree.start[node] > position)):
        node[below] = tree.parent[node[below]]
    return node


def _ranges(
    low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All of the ranges `[low, high)` end to end, and the bounds of each in that."""
    counts = high - low
    bounds = np.append(0, np.cumsum(counts))
    return np.repeat(low - bounds[:-1], counts) + np.arange(bounds[-1]), bounds


def _changes(*columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each entry differs from the one before in some column; the first one does."""
    differs = np.zeros(len(columns[0]), bool)
    differs[:1] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return differs
