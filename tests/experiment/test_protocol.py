"""Warm-ups, random order, medians with intervals."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest

from pipeline.experiment.protocol import Protocol, median_interval, run_rounds, speedup_interval


def order_of(protocol: Protocol, cells: str = "abc") -> tuple[list[str], dict[str, list[int]]]:
    """Which cell ran when, and the results: the number of the run."""
    calls: list[str] = []

    def run(cell: str) -> int:
        calls.append(cell)
        return len(calls)

    runs = {cell: lambda cell=cell: run(cell) for cell in cells}
    return calls, run_rounds(runs, protocol)


def test_five_runs_or_more_are_thrown_away() -> None:
    """Seen red: discarding `warmups` rounds too few."""
    calls, results = order_of(Protocol(repeats=4, warmups=5))
    assert len(calls) == 3 * 2 + 3 * 4
    assert min(min(found) for found in results.values()) == 7
    assert all(len(found) == 4 for found in results.values())


def test_every_round_runs_every_cell_once_in_an_order_of_its_own() -> None:
    """Seen red: `list(runs)` unshuffled."""
    calls, _ = order_of(Protocol(repeats=30, warmups=0))
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert max(Counter(one[0] for one in rounds).values()) < 20


def test_the_order_is_the_seeds() -> None:
    assert order_of(Protocol(5, 1, seed=3)) == order_of(Protocol(5, 1, seed=3))
    assert order_of(Protocol(5, 1, seed=3))[0] != order_of(Protocol(5, 1, seed=4))[0]


def slow_quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slow_medians(values: list[float], draw: np.random.Generator) -> list[float]:
    picks = draw.integers(0, len(values), (2000, len(values)))
    return [statistics.median([values[i] for i in pick]) for pick in picks.tolist()]


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_an_interval_is_what_a_slow_bootstrap_says(count: int) -> None:
    """Seen red: a mean in place of the median; 90 in place of 95 %."""
    values = np.random.default_rng(count).gamma(2.0, size=count).tolist()
    medians = slow_medians(values, np.random.default_rng(0))
    expected = (
        statistics.median(values),
        slow_quantile(medians, 0.025),
        slow_quantile(medians, 0.975),
    )
    assert median_interval(values) == pytest.approx(expected)


def test_a_speedup_is_of_medians_and_its_interval_resamples_both_arms() -> None:
    draw = np.random.default_rng(5)
    base, ours = draw.gamma(9.0, size=31).tolist(), draw.gamma(5.0, size=31).tolist()
    picks = np.random.default_rng(0)
    pairs = zip(slow_medians(base, picks), slow_medians(ours, picks), strict=True)
    saved = [100 * (a - b) / a for a, b in pairs]
    point = 100 * (1 - statistics.median(ours) / statistics.median(base))
    expected = (point, slow_quantile(saved, 0.025), slow_quantile(saved, 0.975))
    assert speedup_interval(base, ours) == pytest.approx(expected)


@pytest.mark.parametrize(("repeats", "warmups"), [(0, 5), (30, -1)])
def test_counts_that_measure_nothing_are_refused(repeats: int, warmups: int) -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        Protocol(repeats, warmups)
