from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from pipeline.report.metrics import Accuracy, count_finish_reasons, measure, measure_accuracy
from tests.report.run_sample import AUDIT, COUNTERS, PLAN, output_rows


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
