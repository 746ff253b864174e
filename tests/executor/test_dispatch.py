"""The dispatch against a ledger of sets, under any order of answers, shares, ends and deaths."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.executor.dispatch import Dispatch, Piece, not_worth_keeping
from pipeline.plan.plan import Plan
from pipeline.plan.shards import Costs
from pipeline.plan.subplan import prefill_tokens
from tests.engine.tiny import GREEDY, LONGER, plan_of, random_prompts
from tests.plan.test_plan import make_plan, params_strategy
from tests.plan.trie_oracle import Drawn, drawn_rows


class Ledger:
    """Where every sequence is, as sets that are counted again after each event."""

    def __init__(self, plan: Plan, num_workers: int) -> None:
        self.work = Dispatch(plan, num_workers)
        self.everything = set(range(len(plan.sequences)))
        self.pieces: dict[int, list[Piece]] = {worker: [] for worker in range(num_workers)}
        self.held: dict[int, dict[int, set[int]]] = {w: {} for w in range(num_workers)}
        self.answered: Counter[int] = Counter()
        self.given_up: Counter[int] = Counter()
        self.deaths = 0

    def take(self, worker: int) -> bool:
        piece = self.work.take(worker)
        if piece is None:
            return False
        self.pieces[worker].append(piece)
        self.held[worker][piece.number] = set(piece.positions.tolist())
        return True

    def answer(self, worker: int, draw: random.Random) -> None:
        piece = self.pieces[worker][0]
        rest = sorted(self.held[worker][piece.number])
        if rest:
            position = draw.choice(rest)
            self.held[worker][piece.number].discard(position)
            self.work.answer(worker, piece.number, position)
            self.answered[position] += 1
        self.end_if_through(worker)

    def end_if_through(self, worker: int) -> None:
        piece = self.pieces[worker][0]
        if not self.held[worker][piece.number]:
            assert not len(self.work.end(worker, piece.number))
            self.forget(worker, piece)

    def forget(self, worker: int, piece: Piece) -> None:
        self.pieces[worker].remove(piece)
        del self.held[worker][piece.number]

    def give_back(self, worker: int, draw: random.Random) -> None:
        """Of the last piece, some of the last sequences, maybe all."""
        piece = self.pieces[worker][-1]
        rest = sorted(self.held[worker][piece.number])
        given = rest[draw.randrange(len(rest) + 1) :]
        if given:
            self.held[worker][piece.number] -= set(given)
            self.work.give_back(worker, piece.number, np.array(given, np.int64))

    def drain(self, worker: int) -> None:
        """An engine that ends before all is answered."""
        piece = self.pieces[worker][0]
        rest = self.work.end(worker, piece.number)
        assert set(rest.tolist()) == self.held[worker][piece.number]
        self.forget(worker, piece)

    def die(self, worker: int) -> None:
        self.deaths += 1
        self.given_up.update(self.work.lose(worker).tolist())
        self.pieces[worker], self.held[worker] = [], {}

    def check(self) -> None:
        """Every sequence is waiting, with one worker, answered or given up; in one of them only."""
        waiting = [s for *_, piece in self.work._waiting for s in piece.positions.tolist()]
        held = [s for pieces in self.held.values() for rest in pieces.values() for s in rest]
        places = Counter(waiting) + Counter(held) + self.answered + self.given_up
        assert places == Counter(self.everything)
        closed = len(self.answered) + len(self.given_up)
        assert self.work.is_over == (closed == len(self.everything))
        for worker, pieces in self.pieces.items():
            assert self.work.held(worker) == len(pieces)
            assert (self.work._benches[worker].left == 0) or pieces


@given(drawn_rows(), params_strategy, st.integers(1, 4), st.randoms(use_true_random=False))
def test_nothing_is_lost_or_doubled_whatever_happens(
    drawn: Drawn, params: list[int], num_workers: int, draw: random.Random
) -> None:
    """Seen red: a worker that gave sequences back and got them again in another piece was asked for
    them by both, when a sequence was marked with its worker and not with its piece."""
    plan = make_plan(drawn, params)
    ledger = Ledger(plan, num_workers)
    ledger.check()
    for _ in range(60):
        worker = draw.randrange(num_workers)
        act = draw.choice(["take", "answer", "answer", "answer", "give back", "drain", "die"])
        if act == "take":
            ledger.take(worker)
        elif act == "die":
            ledger.die(worker)
        elif ledger.pieces[worker]:
            if act == "answer":
                ledger.answer(worker, draw)
            elif act == "give back":
                ledger.give_back(worker, draw)
            else:
                ledger.drain(worker)
        ledger.check()
    while not ledger.work.is_over:  # and what is left can always be done
        for worker in range(num_workers):
            ledger.take(worker)
            while ledger.pieces[worker]:
                ledger.answer(worker, draw)
    ledger.check()


def all_pieces(work: Dispatch) -> Iterator[Piece]:
    """As one worker gets them that does one after the other."""
    while piece := work.take(0):
        yield piece
        for position in piece.positions.tolist():
            work.answer(0, piece.number, position)
        work.end(0, piece.number)


@given(drawn_rows(), params_strategy, st.integers(1, 6))
def test_pieces_come_longest_first_and_tile_the_plan(
    drawn: Drawn, params: list[int], num_workers: int
) -> None:
    plan = make_plan(drawn, params)
    costs, taken = [], []
    for piece in all_pieces(Dispatch(plan, num_workers)):
        needed = prefill_tokens(plan, piece.positions)
        assert piece.cost == needed + plan.max_new_tokens[piece.positions].sum()
        costs.append(piece.cost)
        taken += piece.positions.tolist()
    assert costs == sorted(costs, reverse=True)
    assert sorted(taken) == list(range(len(plan.sequences)))


@given(drawn_rows(), st.integers(2, 4))
def test_a_group_within_the_fair_share_is_never_cut(drawn: Drawn, num_workers: int) -> None:
    plan = make_plan(drawn, [0])
    total = Costs(plan).whole(0, len(plan.sequences))
    home: dict[int, int] = {}
    for piece in all_pieces(Dispatch(plan, num_workers)):
        home |= dict.fromkeys(piece.positions.tolist(), piece.number)
    for top in np.flatnonzero(plan.tree.parent < 0).tolist():
        low, high = int(plan.sequence_lo[top]), int(plan.sequence_hi[top])
        if low < high and Costs(plan).whole(low, high) * num_workers <= total:
            assert len({home[s] for s in range(low, high)}) == 1


def many_rows() -> Plan:
    rows = [[9] * 50 + [row // 8, row] for row in range(400)]
    return plan_of([[min(t, 90) for t in row] for row in rows] + random_prompts(random.Random(1)))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_sequence_that_kills_its_workers_is_given_up_and_no_other(num_workers: int) -> None:
    """By elimination: which one it is nobody says, and what a worker had answered when it died
    nobody has heard. Seen red: with a second piece at hand, the first one was blamed for it."""
    plan = many_rows()
    poison = len(plan.sequences) // 3
    ledger = Ledger(plan, num_workers)
    for _ in range(2_000):
        if ledger.work.is_over:
            break
        for worker in range(num_workers):
            while len(ledger.pieces[worker]) < 2 and ledger.take(worker):
                pass
            if any(poison in rest for rest in ledger.held[worker].values()):
                ledger.die(worker)
            else:
                while ledger.pieces[worker]:
                    ledger.answer(worker, random.Random(0))
            ledger.check()
    assert ledger.work.is_over and ledger.given_up == Counter([poison])
    assert 3 <= ledger.deaths <= 8  # two of the benefit of the doubt, then by eighths


def test_two_losses_of_a_machine_cost_no_row() -> None:
    """Nothing is given up that was not lost alone, again and again."""
    ledger = Ledger(many_rows(), 2)
    for _ in range(2):
        for worker in (0, 1):
            ledger.take(worker)
            ledger.die(worker)
    ledger.check()
    assert not ledger.given_up


def brute_force(plan: Plan, unanswered: list[int], waiting: list[int]) -> int:
    """Least end of two workers over all cuts, counted prefix by prefix."""
    costs = Costs(plan)

    def alone(sequences: list[int]) -> int:
        if not sequences:
            return 0
        positions = np.array(sequences, np.int64)
        return prefill_tokens(plan, positions) + int(plan.max_new_tokens[positions].sum())

    begun = sum(int(costs.own[s]) for s in unanswered if s not in waiting) // 2
    before = list(range(waiting[0]))
    ends = []
    for cut in range(len(waiting) + 1):
        kept = alone(before + waiting[:cut]) - alone(before)
        ends.append(max(begun + kept, alone(waiting[cut:])))
    return min(ends)


@given(st.integers(0, 1000), st.data())
def test_a_share_is_cut_where_both_end_soonest(seed: int, data: st.DataObject) -> None:
    prompts = random_prompts(random.Random(seed), rows=12)
    plan = plan_of(prompts, (GREEDY, LONGER), [i % 2 for i in range(12)])
    count = len(plan.sequences)
    first = data.draw(st.integers(0, count - 1))
    on_device = data.draw(st.sets(st.integers(0, first - 1))) if first else set()
    waiting = list(range(first, count))
    unanswered = sorted(on_device) + waiting
    costs = Costs(plan)
    chosen = not_worth_keeping(
        costs, np.array(unanswered, np.int64), np.array(waiting, np.int64), 1
    ).tolist()
    assert chosen == waiting[len(waiting) - len(chosen) :]
    kept = waiting[: len(waiting) - len(chosen)]
    begun = sum(int(costs.own[s]) for s in on_device) // 2
    given = costs.whole(chosen[0], count) if chosen else 0
    end = max(begun + sum(int(costs.own[s]) for s in kept), given)
    assert end == brute_force(plan, unanswered, waiting)


def test_what_saves_little_is_not_shared() -> None:
    plan = plan_of([[5, 6, 7]] * 1 + [[8, 9], [10]])
    waiting = np.arange(3)
    assert len(not_worth_keeping(Costs(plan), waiting, waiting, 1)) > 0
    assert not len(not_worth_keeping(Costs(plan), waiting, waiting, 10**6))


def test_who_has_most_left_is_asked_and_nobody_twice() -> None:
    work = Dispatch(many_rows(), 3)
    for worker in range(3):
        work.take(worker)
    left = {worker: work._benches[worker].left for worker in range(3)}
    asked = [work.candidate() for _ in range(4)]
    assert asked[3] is None
    assert [left[w] for w in asked[:3] if w is not None] == sorted(left.values(), reverse=True)
