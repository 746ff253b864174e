"""The numbers of a conversation's cache, and that a fault of ours is never a result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.health import TurnHealth, is_degenerate, measure
from pipeline.errors import EngineError
from pipeline.records import EvictionEvent


@given(st.lists(st.integers(0, 60), min_size=1), st.integers(0, 70))
def test_what_is_measured_is_what_counting_finds(at: list[int], query: int) -> None:
    standing = measure(np.array(at), query)
    distinct = set(at)
    assert standing.span == query - min(at)
    assert standing.skew == max(0, max(at) + 1 - query)
    assert standing.duplicate_positions == len(at) - len(distinct)
    assert standing.runs == sum(i + 1 not in distinct for i in distinct)
    extent = max(at) - min(at) + 1
    assert standing.gap_ratio == pytest.approx(1 - len(at) / extent)


def test_runs_are_those_of_the_tokens_and_not_of_where_they_stand() -> None:
    numbers = np.array([0, 1, 2, 3, 90, 91, 92, 93])
    assert measure(np.arange(8), 8, numbers)[:4] == (8, 0, 0, 2)
    assert measure(np.arange(8), 8, numbers).gap_ratio == pytest.approx(1 - 8 / 94)


def test_of_heads_the_worst_counts() -> None:
    at = np.array([[[5, 6, 7]], [[0, 1, 7]]])
    assert measure(at, 8) == (8, 0, 0, 2, 1 - 3 / 8)


def test_stale_positions_are_seen() -> None:
    """The newest 28 of 48 tokens are kept, and the next query stands at 28."""
    assert measure(np.arange(20, 48), 28).skew == 20
    assert measure(np.append(np.arange(20, 48), 28), 29).duplicate_positions == 1


def test_a_key_in_the_future_or_a_position_used_twice_is_an_error_of_ours() -> None:
    health = TurnHealth(window=64, history_tokens=0)
    with pytest.raises(EngineError, match="20 positions in its query's future"):
        health.stands(measure(np.arange(20, 48), 28))
    with pytest.raises(EngineError, match="1 keys of a conversation stand where others do"):
        health.stands(measure(np.array([0, 1, 1]), 2))


def test_a_turn_reports_its_worst_and_its_end() -> None:
    health = TurnHealth(window=64, history_tokens=30, key_turns=1)
    health.stands(measure(np.arange(40), 40))
    health.prefilled(40)
    kept = np.append(np.arange(4), np.arange(20, 40))
    event = EvictionEvent(40, ((0, 4, 20, 40),))
    health.evicted(event, mass_kept=0.8)
    health.evicted(event, mass_kept=0.9)
    health.stands(measure(np.append(kept, 40), 41))
    state = health.state(41, np.append(kept, 40), is_degenerate=False)
    assert (state.history_tokens, state.kept_tokens, state.evicted_tokens) == (30, 25, 16)
    assert (state.evictions, state.span, state.ctx_frac) == (2, 41, 41 / 64)
    assert (state.skew, state.duplicate_positions, state.runs) == (0, 0, 2)
    assert state.gap_ratio == pytest.approx(1 - 25 / 41)
    assert (state.sink_kept, state.mass_kept, state.key_turns) == (True, 0.8, 1)
    assert (state.prefill_peak, state.degenerate) == (40, False)
    assert state.eviction_log == (event, event)


def test_the_sink_is_the_first_token_in_every_head() -> None:
    health = TurnHealth(window=64, history_tokens=0)
    assert health.state(9, np.array([0, 5]), False).sink_kept
    assert not health.state(9, np.array([[[0, 5]], [[1, 5]]]), False).sink_kept
    assert not health.state(9, np.array([], np.int64), False).sink_kept


@pytest.mark.parametrize(
    ("ids", "before", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [], False),
        ([7] * 8, [], True),
        ([1, 2, 3] * 5, [], True),
        ([*range(10)] * 3, [], True),  # a long period as well
        ([*range(30), *range(10)], [], False),  # a quarter is said again
        ([*range(9), 50, *range(9)], [], False),  # just under a half
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], True),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], False),
        ([4, 3], [4, 3], False),  # a "yes" twice
        ([], [], False),
    ],
)
def test_an_answer_that_repeats_is_degenerate(
    ids: list[int], before: list[int], expected: bool
) -> None:
    assert is_degenerate(ids, before) is expected
