"""Rows in bins: each answered row in one, and the label says which."""

from __future__ import annotations

import polars as pl
import pytest

from pipeline.report.bins import measure_depths, measure_group_sizes
from tests.report.run_sample import output_rows


def test_the_depth_bins_hold_every_answered_row_once() -> None:
    rows = output_rows().filter(pl.col("status") == "ok").with_columns(dedup_of=pl.lit(None))
    bins = measure_depths(rows.lazy())
    assert sum(b.rows for b in bins) == 1200
    assert sum(b.cached_tokens for b in bins) == rows["cached_tokens"].sum()
    assert sum(b.computed_tokens + b.cached_tokens for b in bins) == rows["prompt_tokens"].sum()
    assert all(b.service_p10_s <= b.service_p50_s <= b.service_p90_s for b in bins)


@pytest.mark.parametrize(
    ("depth", "label"),
    [
        (0, "0"),
        (1, "1–15"),
        (15, "1–15"),
        (16, "16–63"),
        (64, "64–255"),
        (256, "256–1k"),
        (4095, "1k–4k"),
        (20000, "16k+"),
    ],
)
def test_a_depth_falls_into_the_bin_that_its_label_names(depth: int, label: str) -> None:
    row = {
        "status": "ok", "dedup_of": None, "reuse_depth": depth, "prompt_tokens": depth + 1,
        "cached_tokens": depth, "queue_s": 2.0, "latency_s": 2.5,
    }  # fmt: skip
    (only,) = measure_depths(pl.LazyFrame([row]))
    assert (only.label, only.service_p50_s, only.computed_tokens) == (label, 0.5, 1)


def test_copied_and_failed_rows_have_no_latency() -> None:
    row = {
        "reuse_depth": 1, "prompt_tokens": 2, "cached_tokens": 0, "queue_s": 0.0, "latency_s": 1.0
    }  # fmt: skip
    rows = [row | {"status": "ok", "dedup_of": "a"}, row | {"status": "error", "dedup_of": None}]
    assert measure_depths(pl.LazyFrame(rows)) == ()


def test_group_sizes_count_rows() -> None:
    groups = [None, None, None, 2, 2, 2, 2, 3]
    rows = pl.LazyFrame({"status": ["ok"] * 8, "group_id": groups})
    found = [(b.label, b.rows) for b in measure_group_sizes(rows)]
    assert found == [("1", 4), ("2–3", 0), ("4–15", 4)]
