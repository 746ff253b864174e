"""Every evictor against one that goes through lists; what is kept is written and read as runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.engine.eviction import Held, choose, mask_of, runs_of
from pipeline.plan.conversations import BY_HEAD, BY_WEIGHTS, Eviction, Evictor
from pipeline.records import EvictionEvent

EVICTORS: tuple[Evictor, ...] = (
    "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o", "snapkv",
    "random",
)  # fmt: skip


UNITS: tuple[Literal["token", "turn"], ...] = ("token", "turn")


class Case(NamedTuple):
    eviction: Eviction
    held: Held
    keep: int


@st.composite
def cases(draw: st.DrawFn, evictor: Evictor | None = None) -> Case:
    """Some turns, of which earlier evictions have left some tokens."""
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=6))
    starts = np.append(0, np.cumsum(lengths)).astype(np.int64)
    question = int(draw(st.sampled_from([starts[-2], starts[-1]])))
    question_end = min(int(starts[-1]), question + draw(st.integers(0, 30)))
    system = draw(st.integers(0, min(lengths[0], 6)))
    chosen = draw(st.sampled_from(EVICTORS)) if evictor is None else evictor
    eviction = Eviction(
        evictor=chosen,
        sink_tokens=draw(st.integers(0, 6)),
        gist_tokens=draw(st.integers(0, 40)),
        unit=draw(st.sampled_from(UNITS)),
        seed=draw(st.integers(0, 3)),
    )
    random = np.random.default_rng(draw(st.integers(0, 999)))
    every = np.arange(starts[-1])
    stays = (every < system) | ((every >= question) & (every < question_end))
    some = np.flatnonzero(~stays)
    count = int(len(some) * draw(st.sampled_from([0.2, 0.7, 1.0])))
    shape = (2, 3) if chosen in BY_HEAD else ()
    rows = [
        np.sort(np.append(np.flatnonzero(stays), random.permutation(some)[:count]))
        for _ in range(int(np.prod(shape)))
    ]
    if eviction.unit == "turn":  # all heads lose the same turns
        rows = rows[:1] * len(rows)
    index = np.stack(rows).reshape(*shape, -1).astype(np.int64)
    weights = (
        random.integers(0, 9, index.shape).astype(np.float32) if chosen in BY_WEIGHTS else None
    )
    held = Held(index, starts[:-1], system, question, question_end, weights)
    return Case(eviction, held, draw(st.integers(0, index.shape[-1] + 3)))


def slowly(case: Case, index: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The tokens of one head that stay; not for "random"."""
    eviction, held, keep = case
    evictor, weight = eviction.evictor, dict(zip(index, weights, strict=True))
    if len(index) <= keep:
        return list(index)
    protected = {i for i in index if held.question <= i < held.question_end}
    if evictor != "window":
        protected |= {i for i in index if i < held.system}
    firsts = {"gist": eviction.gist_tokens, "gist-recent": eviction.gist_tokens,
              "sink-recent": eviction.sink_tokens}.get(evictor, 0)  # fmt: skip
    others = [i for i in index if i not in protected]
    newest_first = others[::-1]
    if eviction.unit == "turn":
        stays = protected | {i for i in index if i < firsts}
        turns = [
            [i for i in others if low <= i < high and i not in stays and i < held.question]
            for low, high in zip(held.turn_starts, [*held.turn_starts[1:], 10**9], strict=True)
        ]
        left = list(index)
        for turn in turns:
            if len(left) > keep:
                left = [i for i in left if i not in turn]
        answer = [i for i in left if i >= held.question and i not in stays]
        firsts_of_history = [i for i in left if i < firsts and i not in protected]
        for i in answer + firsts_of_history[::-1]:
            if len(left) > keep:
                left.remove(i)
        return left
    if evictor == "oldest":
        while len(protected) + len(others) > keep and others:
            others = others[(len(others) + 3) // 4 :]
        return sorted(protected | set(others))
    byweight = sorted(others, key=lambda i: (weight[i], i), reverse=True)
    order = {
        "window": newest_first,
        "gist": [i for i in others if i < firsts]
        + [i for i in newest_first if i >= max(firsts, held.question)],
        "gist-recent": [i for i in others if i < firsts] + newest_first,
        "sink-recent": [i for i in others if i < firsts] + newest_first,
        "attention-top": byweight,
        "h2o": [i for i in newest_first if i in index[len(index) - keep // 2 :]] + byweight,
        "snapkv": _by_snapkv(case, index, weights, newest_first),
    }[evictor]
    stays = set(protected)
    for i in order:
        if len(stays) < keep:
            stays.add(i)
    return sorted(stays)


def _by_snapkv(
    case: Case, index: Sequence[int], weights: Sequence[float], newest_first: list[int]
) -> list[int]:
    prefilled = [i for i in index if i < case.held.question_end]
    first = (prefilled[-32:] or [10**9])[0]
    window = {i for i in index if i >= first} | {i for i in index if i >= case.held.question_end}
    plain = [0.0 if i in window else w for i, w in zip(index, weights, strict=True)]
    padded = [0.0, 0.0, *plain, 0.0, 0.0]
    pooled = {i: sum(padded[n : n + 5]) for n, i in enumerate(index)}
    rest = sorted((i for i in newest_first if i not in window), key=lambda i: (pooled[i], i))
    return [i for i in newest_first if i in window] + rest[::-1]


@settings(max_examples=400, deadline=None)
@given(cases())
def test_an_evictor_keeps_what_going_through_lists_keeps(case: Case) -> None:
    assume(case.eviction.evictor != "random" or case.eviction.unit == "turn")
    mask = choose(*case, key=5)
    index = case.held.index
    weights = np.zeros(index.shape) if case.held.weights is None else case.held.weights
    assert mask.shape == index.shape
    for row, kept, weight in zip(_rows(index), _rows(mask), _rows(weights), strict=True):
        assert row[kept].tolist() == slowly(case, row.tolist(), weight.tolist())


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_budget_is_kept_and_what_is_protected_stays(case: Case) -> None:
    eviction, held, keep = case
    mask = choose(*case, key=5)
    protected = held.is_protected(eviction.evictor)
    assert mask[protected].all()
    counts = set(mask.sum(-1).ravel().tolist())
    full = min(held.index.shape[-1], max(keep, int(protected.sum(-1).max())))
    coarse = eviction.unit == "turn" or eviction.evictor in ("oldest", "gist")
    exact = not coarse or full == held.index.shape[-1]
    assert counts == {full} if exact else max(counts) <= full


@settings(max_examples=100, deadline=None)
@given(cases(evictor="random"))
def test_random_is_the_same_for_a_conversation_and_differs_between_them(case: Case) -> None:
    assert (choose(*case, key=5) == choose(*case, key=5)).all()
    assume(case.eviction.unit == "token")
    count = case.held.index.shape[-1]
    fixed = int(case.held.is_protected("random").sum())
    if count - fixed > 40 and fixed + 15 < case.keep < count - 15:
        assert (choose(*case, key=5) != choose(*case, key=6)).any()


def test_random_is_no_age() -> None:
    """Over many conversations each token stays as often as any other."""
    held = Held(np.arange(40), np.array([0]), 0, 40, 40)
    kept = np.sum([choose(Eviction("random"), held, 20, key) for key in range(2000)], 0)
    assert 900 < kept.min() and kept.max() < 1100


@settings(max_examples=100, deadline=None)
@given(cases())
def test_an_event_replays_the_eviction(case: Case) -> None:
    index = case.held.index
    mask = choose(*case, key=5)
    kept = index[mask].reshape(*index.shape[:-1], -1)
    event = EvictionEvent(int(index.max(initial=-1)) + 1, runs_of(kept))
    assert (mask_of(event, index) == mask).all()
    assert all(len(runs) % 2 == 0 for runs in event.kept)


def test_runs_are_as_few_as_can_be() -> None:
    assert runs_of(np.array([0, 1, 2, 5, 7, 8])) == ((0, 3, 5, 6, 7, 9),)
    assert runs_of(np.array([], np.int64)) == ((),)
    assert runs_of(np.array([[[0, 1], [3, 5]]])) == ((0, 2), (3, 4, 5, 6))


def test_all_of_a_gist_stays_and_of_recent_turns_nothing() -> None:
    """100 tokens, the current turn from 80 on, its answer from 90 on."""
    held = Held(np.arange(100), np.array([0, 30, 80]), 3, 80, 90)
    mask = choose(Eviction("gist", gist_tokens=16), held, 50, 0)
    assert np.flatnonzero(mask).tolist() == [*range(16), *range(80, 100)]


def test_sinks_and_the_newest_stay() -> None:
    held = Held(np.arange(100), np.array([0, 30, 80]), 0, 100, 100)
    mask = choose(Eviction("sink-recent", sink_tokens=4), held, 10, 0)
    assert np.flatnonzero(mask).tolist() == [0, 1, 2, 3, *range(94, 100)]


def test_old_tokens_of_a_long_answer_go_before_its_question() -> None:
    """All evictors: the turn's own prompt is 40..50, the answer 50..100; 20 may stay."""
    weights = np.linspace(1, 0, 100, dtype=np.float32)
    for evictor in EVICTORS:
        shape = (1, 1, 100) if evictor in BY_HEAD else (100,)
        held = Held(
            np.arange(100).reshape(shape), np.array([0, 40]), 0, 40, 50, weights.reshape(shape)
        )
        mask = choose(Eviction(evictor, gist_tokens=2), held, 20, 0).ravel()
        assert mask[40:50].all() and mask[:40].sum() + mask[50:].sum() <= 10, evictor
        if evictor not in ("attention-top", "random", "oldest"):
            assert mask[99] and not mask[50], evictor


def test_whole_turns_go_oldest_first() -> None:
    held = Held(np.arange(100), np.array([0, 20, 50, 90]), 5, 90, 100)
    eviction = Eviction("sink-recent", sink_tokens=8, unit="turn")
    mask = choose(eviction, held, 70, 0)
    assert np.flatnonzero(mask).tolist() == [*range(8), *range(50, 100)]
    mask = choose(eviction, held, 90, 0)
    assert np.flatnonzero(mask).tolist() == [*range(8), *range(20, 100)]


@pytest.mark.parametrize("evictor", BY_WEIGHTS)
def test_evictors_by_weights_ask_for_them(evictor: Evictor) -> None:
    with pytest.raises(AssertionError, match="goes by weights"):
        choose(Eviction(evictor), Held(np.arange(9), np.array([0]), 0, 9, 9), 5, 0)


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
