from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from pipeline.audit.sample import POOL_ROWS, candidate_rows, choose_rows


def output_rows(groups: int, rows_per_group: int, singletons: int) -> pl.DataFrame:
    grouped = groups * rows_per_group
    total = grouped + singletons
    place = [i % rows_per_group for i in range(grouped)]
    return pl.DataFrame(
        {
            "id": [f"r{i}" for i in range(total)],
            "row_index": range(total),
            "group_id": [i // rows_per_group for i in range(grouped)] + [None] * singletons,
            "reuse_depth": [100] * grouped + [0] * singletons,
            "prompt_tokens": [120] * grouped + [30] * singletons,
            "completion_tokens": [8] * total,
            "finish_reason": ["stop"] * total,
            "cached_tokens": [0 if p == 0 else 100 for p in place] + [0] * singletons,
        },
        schema_overrides={"group_id": pl.Int64},
    )


def indices(rows: pl.DataFrame) -> list[int]:
    return rows["row_index"].to_list()


def test_every_group_is_covered_even_beyond_the_size() -> None:
    rows = output_rows(groups=40, rows_per_group=3, singletons=10)
    chosen = choose_rows(rows, size=5, seed=1)
    assert sorted(chosen["group_id"].to_list()) == list(range(40))
    assert chosen["cached_tokens"].min() == 100  # rows that reused, not the ones that paid


@pytest.mark.parametrize("size", [0, 1, 7, 30, 10_000])
def test_the_size_is_met_without_repeats(size: int) -> None:
    rows = output_rows(groups=4, rows_per_group=3, singletons=30)
    chosen = choose_rows(rows, size, seed=2)
    assert len(chosen) == max(4, min(size, 42))
    assert indices(chosen) == sorted(set(indices(chosen)))
    assert chosen.columns == rows.columns


def test_the_seed_decides_and_the_order_of_the_rows_does_not() -> None:
    rows = output_rows(groups=2, rows_per_group=5, singletons=300)
    mixed = rows.sample(fraction=1.0, shuffle=True, seed=9)
    embed = _two_bunches
    assert indices(choose_rows(rows, 20, 3, embed)) == indices(choose_rows(mixed, 20, 3, embed))
    assert indices(choose_rows(rows, 20, 3, embed)) != indices(choose_rows(rows, 20, 4, embed))


def test_strata_are_served_in_turn() -> None:
    common = output_rows(groups=0, rows_per_group=1, singletons=500)
    rare = common.head(3).with_columns(
        row_index=pl.col("row_index") + 1000, prompt_tokens=pl.lit(9000, pl.Int64)
    )
    for seed in range(5):
        chosen = choose_rows(pl.concat([common, rare]), 8, seed)
        assert chosen.filter(pl.col("prompt_tokens") == 9000).height >= 2


def _two_bunches(row_indices: Sequence[int]) -> NDArray[np.float32]:
    """One row in fifty lies far away from all others."""
    far = np.array(row_indices) % 50 == 0
    noise = np.random.default_rng(0).normal(0, 0.01, (len(row_indices), 4))
    return (noise + np.where(far, 5.0, 0.0)[:, None]).astype(np.float32)


def test_clusters_bring_in_the_unusual_prompt() -> None:
    rows = output_rows(groups=0, rows_per_group=1, singletons=400)
    found = [
        any(i % 50 == 0 for i in indices(choose_rows(rows, 8, seed, _two_bunches)))
        for seed in range(10)
    ]
    assert all(found)


def test_the_encoder_sees_a_bounded_pool(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def embed(row_indices: Sequence[int]) -> NDArray[np.float32]:
        seen.extend(row_indices)
        return _two_bunches(row_indices)

    rows = output_rows(groups=0, rows_per_group=1, singletons=3 * POOL_ROWS)
    chosen = choose_rows(rows, 200, 0, embed)
    assert len(seen) == POOL_ROWS
    assert len(chosen) == 200
    assert capfd.readouterr() == ("", "")


def test_failed_and_copied_rows_are_no_candidates() -> None:
    rows = output_rows(groups=0, rows_per_group=1, singletons=3).with_columns(
        status=pl.Series(["ok", "error", "ok"]), dedup_of=pl.Series([None, None, "r0"])
    )
    assert indices(candidate_rows(rows.lazy())) == [0]
