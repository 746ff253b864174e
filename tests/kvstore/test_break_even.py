"""From which depth on loading pays: by arithmetic, and by loads that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.kvstore import break_even
from pipeline.kvstore.break_even import LoadCost, break_even_tokens, measure_load_cost
from tests.kvstore.oracle import IDENTITY


@pytest.mark.parametrize("entry_s", [0.0, 0.001, 0.01])
def test_it_is_the_least_depth_whose_load_is_no_slower(entry_s: float) -> None:
    cost, per_token, rate = LoadCost(entry_s, 1e9), 100_000, 1000.0
    least = break_even_tokens(cost, per_token, rate)
    faster = [n for n in range(1, 50) if cost.seconds(n * per_token) <= n / rate]
    assert least == faster[0]


def test_it_is_rounded_up_to_a_whole_token() -> None:
    assert break_even_tokens(LoadCost(0.01, 1e9), 100_000, 1000.0) == 12  # 11.1


@pytest.mark.parametrize("rate", [10_000.0, 20_000.0])
def test_it_never_pays_where_a_token_is_computed_faster_than_read(rate: float) -> None:
    assert break_even_tokens(LoadCost(0.0, 1e9), 100_000, rate) is None


def test_the_cost_is_that_of_loads_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 ms an entry and 1 microsecond a byte, which only the two lengths tell apart."""
    per_token = 2 * 2 * 2 * 3 * 4
    monkeypatch.setattr(break_even, "_PROBE_BYTES", 50 * per_token)
    loaded: list[int] = []
    load = break_even._load

    def timed(folder: Path, identity: object, ids: object) -> float:
        assert load(folder, IDENTITY, ids) > 0  # type: ignore[arg-type]
        loaded.append(len(ids))  # type: ignore[arg-type]
        return 0.002 + (loaded[-1] - 1) * per_token * 1e-6

    monkeypatch.setattr(break_even, "_load", timed)
    cost = measure_load_cost(tmp_path / "store", IDENTITY)
    assert cost.entry_s == pytest.approx(0.002)
    assert cost.bytes_per_s == pytest.approx(1e6)
    assert loaded == [1] * 5 + [50] * 5
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        measure_load_cost(tmp_path / "no" / "store", IDENTITY)
