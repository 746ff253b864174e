"""Log-probabilities of given tokens, read while prompts are computed. Knows points, no slots.

The head is computed at points alone, log-softmax in float32 on these rows, and of each row only the
targets and the likeliest token are kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.live import LiveRow
from pipeline.engine.prefill import Chunk
from pipeline.plan.plan import Plan
from pipeline.plan.scores import ScorePlan
from pipeline.records import Scored

MOST_ROWS = 1024
_MOST_BYTES = 128 << 20  # of a host's memory
ROWS_AT_ONCE = 64
"""In float32, and of forwards that give logits in pieces: so few that they stay in a cache."""

_Found = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(positions, points) of a chunk."""


class Scorer:
    """The scores of one run of the engine."""

    def __init__(self, plan: Plan, scores: ScorePlan, most_rows: int) -> None:
        """`most_rows`: of logits, where a forward gives them all together."""
        self._plan = plan
        self._scores = scores
        self._most_rows = most_rows
        self._logprobs = np.full(len(scores.target_id), np.nan, np.float32)
        self._likeliest = np.full(scores.num_points, -1, np.int64)
        self._counted: dict[tuple[int, int, int], _Found] = {}

    def points(self, chunk: Chunk) -> _Found:
        """(positions, points) of a chunk that are read."""
        job, low, high = chunk
        target = job.target
        if not isinstance(target, LiveRow):
            found = self._scores.points_at(target.span.key, low, high)
        else:
            tree = self._plan.tree
            terminal = int(tree.terminal[self._plan.sequences.prompt[target.sequence]])
            nodes = [node for node in tree.path(terminal) if tree.end[node] > low]
            parts = [self._scores.points_at(node, low, high) for node in nodes]
            found = np.concatenate([np.zeros(0, np.int64), *parts])
        return self._scores.point_position[found], found

    def has_room(self, chunks: list[Chunk]) -> bool:
        """For the logits that a forward over them gives; what was found is there for `read`."""
        self._counted = {_key(chunk): self.points(chunk) for chunk in chunks}
        rows = sum(len(points) for _, points in self._counted.values())
        return rows <= self._most_rows

    def read(self, chunks: list[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(packed tokens of a forward over `chunks` whose logits are read, their points)."""
        at, points, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for chunk in chunks:
            _, low, high = chunk
            positions, found = self._counted.get(_key(chunk)) or self.points(chunk)
            at.append(first + positions - low)
            points.append(found)
            first += high - low
        self._counted = {}
        return np.concatenate(at), np.concatenate(points)

    def note(self, points: NDArray[np.int64], logits: Tensor) -> None:
        """`logits` [points, V] in any float dtype; rows that are not finite stay NaN."""
        for low in range(0, len(points), ROWS_AT_ONCE):
            some = points[low : low + ROWS_AT_ONCE]
            rows = logits[low : low + ROWS_AT_ONCE].float()
            self._likeliest[some] = rows.argmax(-1).cpu().numpy()
            targets, row = self._scores.targets_at(some)
            at = torch.from_numpy(row), torch.from_numpy(self._scores.target_id[targets])
            logprobs = torch.log_softmax(rows, -1)[at[0].to(rows.device), at[1].to(rows.device)]
            self._logprobs[targets] = logprobs.cpu().numpy()

    def scored(self, sequence: int) -> tuple[Scored, ...]:
        """Of each request of a sequence, all of which was computed."""
        scores = self._scores
        found = []
        for request in range(*scores.bounds[sequence : sequence + 2].tolist()):
            targets = scores.target_of_token[slice(*scores.token_bounds[request : request + 2])]
            likeliest = self._likeliest[scores.target_point[targets]]
            is_greedy = bool((likeliest == scores.target_id[targets]).all())
            found.append(Scored(tuple(self._logprobs[targets].tolist()), is_greedy))
        return tuple(found)


def most_rows(row_bytes: int, is_on_host: bool) -> int:
    """Of logits, each as wide as the vocabulary, where a forward gives them all together."""
    return min(MOST_ROWS, max(ROWS_AT_ONCE, _MOST_BYTES // row_bytes)) if is_on_host else MOST_ROWS


def _key(chunk: Chunk) -> tuple[int, int, int]:
    job, low, high = chunk
    return id(job), low, high
