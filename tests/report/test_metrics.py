from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from pipeline.report.bins import measure_depths, measure_group_sizes
from pipeline.report.metrics import Accuracy, count_finish_reasons, measure, measure_accuracy
from tests.report.run_sample import AUDIT, COUNTERS, PLAN, output_rows


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


def test_accuracy_strips_and_leaves_unknown_answers_out() -> None:
    rows = pl.LazyFrame(
        {
            "generated_text": [" 7\n", "8", None, "9"],
            "answer": [7, 7, 7, None],
            "task": ["sum", "sum", None, "sum"],
        }
    )
    assert measure_accuracy(rows) == (Accuracy("no task", 1, 0), Accuracy("sum", 2, 1))
    assert measure_accuracy(rows.drop("task")) == (Accuracy("all", 3, 1),)
    assert measure_accuracy(rows.drop("answer")) == ()


def test_finish_reasons_are_counted_over_answered_rows() -> None:
    rows = output_rows().with_columns(
        finish_reason=pl.when(pl.col("row_index") < 300)
        .then(pl.lit("length"))
        .otherwise("finish_reason")
    )
    empty = rows.clear().with_columns(dedup_of=pl.lit(None, pl.String))
    counted = count_finish_reasons(rows.lazy())
    metrics = replace(measure({}, None, None, empty.lazy()), finish_reasons=counted)
    assert metrics.ended_shares == (("stop", 900, 0.75), ("length", 300, 0.25))


def test_time_saved_is_what_the_cached_tokens_would_have_taken() -> None:
    empty = output_rows().clear().with_columns(dedup_of=pl.lit(None, pl.String))
    metrics = measure({"counters": COUNTERS}, None, None, empty.lazy())
    assert metrics.saved_s == pytest.approx(313_580 * 30.0 / 98_765)
    assert measure({}, None, None, empty.lazy()).saved_s is None


def test_shares_come_from_counters() -> None:
    empty = output_rows().clear().with_columns(dedup_of=pl.lit(None, pl.String))
    metrics = measure({"counters": COUNTERS}, PLAN, AUDIT, empty.lazy())
    assert metrics.saved_share == pytest.approx(313_580 / 412_345)
    assert metrics.tokens_per_s == pytest.approx(45_678 / 92.4)
    assert metrics.busy_share == pytest.approx(0.97)
    assert metrics.kv_budget_bytes == 512 << 20
    just_begun = measure({"counters": {}}, None, None, empty.lazy())
    assert (just_begun.saved_share, just_begun.tokens_per_s, just_begun.busy_share) == (None,) * 3
