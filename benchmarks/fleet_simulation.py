"""Workers that take exactly as long as their tokens cost, fed by the dispatch that feeds real ones.

What is simulated is time and noise alone; pieces, order and shares come from `executor.dispatch`.
A worker begins `rows_at_once` sequences before the first of them ends, and what has begun cannot be
taken from it. Messages take no time. Rows that decode together cost no less for it: how a device's
rate falls with few rows is not in the model.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.executor.dispatch import Dispatch, Piece, not_worth_keeping
from pipeline.executor.fleet import _PIECES_AHEAD
from pipeline.plan.plan import Plan
from pipeline.plan.shards import Costs, cut_into_shards
from pipeline.plan.subplan import carve

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """`noise`: [sequences] factor on the cost of each, unknown to the dispatch."""

    plan: Plan
    noise: Floats
    num_workers: int
    decode_weight: float
    rows_at_once: int

    def seconds_alone(self) -> float:
        """What one worker takes for everything, with this noise."""
        return float((Costs(self.plan, self.decode_weight).own * self.noise).sum())

    def service(self, positions: NDArray[np.int64]) -> tuple[Costs, Floats]:
        """Of a worker that computes these and no other: costs as predicted, and as they are."""
        costs = Costs(carve(self.plan, positions), self.decode_weight)
        return costs, costs.own * self.noise[positions]


def noise_by_piece(plan: Plan, num_workers: int, sigma: float, seed: int) -> Floats:
    """Lognormal with mean 1, one draw for each quarter of a worker's share of the rows: what errs
    together does not even out."""
    draw = np.random.default_rng(seed)
    factors = np.ones(len(plan.sequences))
    for some in np.array_split(factors, 4 * num_workers):
        some *= draw.lognormal(-sigma * sigma / 2, sigma)
    return factors


def static_makespan(setting: Setting) -> tuple[float, float]:
    """(seconds until the last of N independent shards ends, what all together compute)."""
    shards = cut_into_shards(setting.plan, setting.num_workers)
    times = [setting.service(s.sequences)[1].sum() if len(s.sequences) else 0.0 for s in shards]
    return float(max(times)), float(sum(times))


class _Worker:
    """A queue of pieces; the first one is on the device."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.pieces: deque[Piece] = deque()
        self.computed = 0.0
        self._start = 0.0
        self._done = 0

    def add(self, piece: Piece, now: float) -> None:
        self.pieces.append(piece)
        if len(self.pieces) == 1:
            self._begin(now)

    def _begin(self, now: float) -> None:
        self.costs, service = self._setting.service(self.pieces[0].positions)
        self._ends = now + np.cumsum(service)
        self._start, self._done = now, 0

    @property
    def end(self) -> float:
        """When its piece is through."""
        return float(self._ends[-1]) if self.pieces else np.inf

    def advance(self, now: float) -> NDArray[np.int64]:
        """Positions that it has answered since it was last asked."""
        if not self.pieces:
            return np.zeros(0, np.int64)
        before, self._done = self._done, int(np.searchsorted(self._ends, now, side="right"))
        return self.pieces[0].positions[before : self._done]

    def finish(self, now: float) -> int:
        """The number of the piece that has ended; the next one begins."""
        self.computed += now - self._start
        number = self.pieces.popleft().number
        if self.pieces:
            self._begin(now)
        return number

    def share(self, least_saved: int) -> tuple[Piece, NDArray[np.int64], bool]:
        """(a piece, what of it is given back, whether it is off the worker's hands)."""
        if len(self.pieces) > 1:
            last = self.pieces.pop()
            return last, last.positions, True
        piece, count = self.pieces[0], len(self._ends)
        waiting = np.arange(min(count, self._done + self._setting.rows_at_once), count)
        chosen = not_worth_keeping(self.costs, np.arange(self._done, count), waiting, least_saved)
        self._ends = self._ends[: count - len(chosen)]
        return piece, piece.positions[chosen], False


def simulate(setting: Setting, steals: bool = True) -> tuple[float, float]:
    """(seconds until the last answer, seconds of all workers together)."""
    work = Dispatch(setting.plan, setting.num_workers, setting.decode_weight)
    workers = [_Worker(setting) for _ in range(setting.num_workers)]
    now = 0.0
    while not work.is_over:
        for most in range(1, _PIECES_AHEAD + 1):
            for number, worker in enumerate(workers):
                if len(worker.pieces) < most and (piece := work.take(number)):
                    worker.add(piece, now)
        if steals and any(not worker.pieces for worker in workers) and _share(work, workers):
            continue
        now = min(worker.end for worker in workers)
        for number, worker in enumerate(workers):
            if worker.pieces:
                running = worker.pieces[0].number
                for position in worker.advance(now).tolist():
                    work.answer(number, running, position)
                if worker.end <= now:
                    work.end(number, worker.finish(now))
    return now, sum(worker.computed for worker in workers)


def _share(work: Dispatch, workers: list[_Worker]) -> bool:
    """Ask one after the other for what has not begun, until one gives."""
    while (number := work.candidate()) is not None:
        piece, given, is_off = workers[number].share(work.least_saved)
        if len(given):
            work.give_back(number, piece.number, given)
        if is_off:
            work.end(number, piece.number)
        if len(given):
            return True
    return False
