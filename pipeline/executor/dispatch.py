"""Who computes what: a plan dealt out to workers. Knows neither machines, nor time, nor tensors.

```
 plan ─► pieces ─► waiting, longest first ─► held by a worker ─► answered, one by one
                        ▲   ▲                    │    │
                        │   └── taken back ──────┘    │  what has not begun, for a worker without
                        └────── worker lost ──────────┘  work; what was not answered
```

A piece is a run of whole groups, or a part of a group that costs more than a worker's fair share,
so only those prefixes are computed twice. Small neighbours go together, for a device wants many
rows at once. A worker that finds nothing waiting gets what another one has not begun, cut where
both end soonest.

A sequence is always in exactly one place: waiting, held by one worker, or answered. What kills
workers is found by elimination: the second time that a piece is lost it comes back in eight parts,
and a sequence that is lost alone, not for the first time, is given up.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan
from pipeline.plan.shards import Costs, cut_into_ranges

Positions = NDArray[np.int64]
"""Ascending indices into the sequences of the dispatched plan."""

_LEAST_SAVED = 100  # a split must save this part of a fair share: starting a piece is not free
_LOST_BEFORE_CUT = 2
_LOST_BEFORE_GIVEN_UP = 3
_PARTS_OF_A_SUSPECT = 8
_WAITING, _CLOSED = -1, -2  # in place of the number of a piece


@dataclass(frozen=True)
class Piece:
    """What a worker gets at once. `cost`: predicted, of all of it; `losses`: workers lost on it."""

    number: int
    positions: Positions
    cost: int
    losses: int = 0


@dataclass
class _Bench:
    """A worker's pieces by number, in the order in which it computes them; cost of what is left."""

    pieces: dict[int, Piece] = field(default_factory=dict)
    left: int = 0
    is_asked: bool = False


def _is_suspect(piece: Piece) -> bool:
    return piece.losses >= _LOST_BEFORE_CUT


def not_worth_keeping(
    costs: Costs, unanswered: Positions, waiting: Positions, least_saved: int
) -> Positions:
    """Of a worker's sequences that have not begun, the last ones, which an idle worker better does.

    Cut so that both end soonest: what the idle one shares with those that are kept it computes
    again. Nothing where that saves less than `least_saved`. `unanswered` holds `waiting` and those
    on the device, of which half is taken to be done.
    """
    if not len(waiting):
        return waiting
    begun = int(costs.own[unanswered].sum()) - int(costs.own[waiting].sum())
    kept = begun // 2 + np.cumsum(costs.own[waiting]) - costs.own[waiting]
    alone = kept[-1] + costs.own[waiting[-1]]
    given = alone - kept + costs.shared[waiting]
    ends = np.maximum(kept, given)
    best = int(ends.argmin())
    return waiting[best:] if alone - ends[best] >= least_saved else waiting[:0]


class Dispatch:
    """The state of one job. Every method is deterministic; none waits."""

    def __init__(self, plan: Plan, num_workers: int, decode_weight: float = 1.0) -> None:
        """`decode_weight`: what a new token costs, in prefilled tokens."""
        self._costs = costs = Costs(plan, decode_weight)
        count = len(plan.sequences)
        fair = -(-costs.whole(0, count) // num_workers)
        self.least_saved = max(1, fair // _LEAST_SAVED)
        self._piece = np.full(count, _WAITING, np.int64)  # the number of the one that is held
        self._num_open = count
        self._num_pieces = 0
        self._waiting: list[tuple[bool, int, int, Piece]] = []
        self._benches = {worker: _Bench() for worker in range(num_workers)}
        for cost, low, high in cut_into_ranges(plan, costs, num_workers).tolist():
            self._wait(np.arange(low, high), cost)

    @property
    def is_over(self) -> bool:
        """Whether every sequence is answered or given up."""
        return self._num_open == 0

    @property
    def has_waiting(self) -> bool:
        """Whether `take` would find a piece."""
        return bool(self._waiting)

    def held(self, worker: int) -> int:
        """Pieces that the worker has and has not ended."""
        return len(self._benches[worker].pieces)

    def take(self, worker: int) -> Piece | None:
        """Hand out the waiting piece of the highest predicted cost, or None.

        A worker that has a piece already gets a second one only while more pieces wait than there
        are workers. A piece on which two workers have died is handed out last, to a worker that
        has nothing else: if that worker dies too, the piece is to blame, and no other can be.
        """
        bench = self._benches[worker]
        if not self._waiting:
            return None
        if bench.pieces and len(self._waiting) <= len(self._benches):
            return None
        if any(map(_is_suspect, [self._waiting[0][-1], *bench.pieces.values()])) and bench.pieces:
            return None
        piece = heapq.heappop(self._waiting)[-1]
        bench.pieces[piece.number] = piece
        bench.left += self._cost(piece.positions)
        self._piece[piece.positions] = piece.number
        return piece

    def answer(self, worker: int, number: int, position: int) -> None:
        """`worker` has answered a sequence of a piece that it holds."""
        bench = self._benches[worker]
        assert number in bench.pieces, f"piece {number} is not with worker {worker}"
        assert self._piece[position] == number, f"{position} is not open in piece {number}"
        bench.left -= int(self._costs.own[position])
        self._close(position)

    def end(self, worker: int, number: int) -> Positions:
        """The worker is through with a piece; returns what it left without an answer, to wait."""
        bench = self._benches[worker]
        piece = bench.pieces.pop(number)
        bench.is_asked = False
        rest = self._still_open(piece)
        self._put_back(bench, rest, piece.losses)
        return rest

    def candidate(self) -> int | None:
        """The worker that has most left, to be asked for what it has not begun; None: nobody.

        Who was asked is not asked again before it has given something or ended a piece.
        """
        able = [
            (-bench.left, worker)
            for worker, bench in self._benches.items()
            if bench.pieces and not bench.is_asked and bench.left > self.least_saved
        ]
        if not able:
            return None
        worker = min(able)[1]
        self._benches[worker].is_asked = True
        return worker

    def give_back(self, worker: int, number: int, positions: Positions) -> None:
        """The worker will not compute these sequences of its piece; they wait for another one."""
        bench = self._benches[worker]
        assert (self._piece[positions] == number).all(), f"not all are open in piece {number}"
        bench.is_asked = False
        self._put_back(bench, positions, bench.pieces[number].losses)

    def lose(self, worker: int) -> Positions:
        """The worker died: what it held and had not answered waits again. Returns what is given up.

        It computes its pieces in order, so only the first can have to do with its death.
        """
        bench, given_up = self._benches[worker], np.zeros(0, np.int64)
        for index, piece in enumerate(bench.pieces.values()):
            rest, losses = self._still_open(piece), piece.losses + (index == 0)
            if index == 0 and len(rest) == 1 and losses >= _LOST_BEFORE_GIVEN_UP:
                given_up = rest
                self._close(int(rest[0]))
            elif index == 0 and losses >= _LOST_BEFORE_CUT:
                for part in np.array_split(rest, _PARTS_OF_A_SUSPECT):
                    self._put_back(bench, part, losses)
            else:
                self._put_back(bench, rest, losses)
        self._benches[worker] = _Bench()
        return given_up

    def _still_open(self, piece: Piece) -> Positions:
        rest: Positions = piece.positions[self._piece[piece.positions] == piece.number]
        return rest

    def _put_back(self, bench: _Bench, positions: Positions, losses: int) -> None:
        if len(positions):
            cost = self._cost(positions)
            bench.left -= cost
            self._piece[positions] = _WAITING
            self._wait(positions, cost + int(self._costs.shared[positions[0]]), losses)

    def _wait(self, positions: Positions, cost: int, losses: int = 0) -> None:
        piece = Piece(self._num_pieces, positions, cost, losses)
        self._num_pieces += 1
        heapq.heappush(self._waiting, (_is_suspect(piece), -cost, piece.number, piece))

    def _close(self, position: int) -> None:
        self._piece[position] = _CLOSED
        self._num_open -= 1

    def _cost(self, positions: Positions) -> int:
        return int(self._costs.own[positions].sum())
