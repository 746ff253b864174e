"""What a person reads of a plan and of a status, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cli.plan_table import plan_table
from pipeline.cli.tables import audit_table, status_table
from tests.report.run_sample import AUDIT

PLAN: dict[str, Any] = {
    "rows": 1200, "rows_rejected": 0, "rejections": None, "distinct_prompts": 1000,
    "sequences": 1000, "prompt_tokens": 40_000, "unique_tokens": 10_000, "saving": 0.75,
    "saving_by_blocks": {"16": 0.7}, "saving_in_given_order": {"cache_tokens": 4096, "saving": 0.5},
    "max_new_tokens": 8000, "gain_bound": 2.67, "groups": 12, "singletons": 3,
    "peak_kv_bytes": None, "kv_budget_bytes": None, "rows_at_once": None, "estimate": None,
    "store": None, "fields": None, "advice": None, "largest_groups": [], "depth_histogram": [],
}  # fmt: skip
FIGURES = {
    "mode": "epic", "distinct": 12, "uses": 90, "tokens": 2400, "kv_bytes": 3 << 20,
    "prompt_tokens": 40_000, "by_this_mode": 5000, "in_given_order": None, "in_best_order": None,
    "at_any_position": 4000, "text": "go on",
}  # fmt: skip
STATUS: dict[str, Any] = {
    "status": "running", "rows": 900, "rows_done": 300, "rows_failed": 2, "rows_left": 600,
    "rows_per_s": None, "eta_s": None, "audit": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "name", "says"),
    [
        ({"rows_rejected": 7}, "rows", "1,200, 7 cannot run"),
        ({"peak_kv_bytes": 3 << 30}, "peak KV", "3.0 GiB"),
        ({"rows_at_once": 64, "kv_budget_bytes": 2 << 30}, "rows at once", "64 within 2.0 GiB"),
        (
            {"estimate": {"prefill_s": 60, "decode_s": 30, "measured_on": "2026-11-22"}},
            "estimated time",
            "1m30s  (prefill 1m00s, decode 30s at most, at the rates of 2026-11-22)",
        ),
        (
            {"documents": FIGURES},
            "documents",
            "12 distinct, 90 uses",
        ),
        ({"documents": FIGURES}, "  each once", "2,400 tokens, 3.0 MiB of KV"),
        ({"documents": FIGURES}, "  by epic", "5,000 tokens to compute, 87.5% saved"),
        ({"documents": FIGURES}, "  at any position", "4,000 tokens to compute, 90.0% saved"),
        ({"documents": FIGURES}, "  advice", "go on"),
        (
            {"store": {"break_even_tokens": 1024, "tokens": 5000}},
            "in the KV store",
            "5,000 of U  (loading pays from 1,024 on)",
        ),
        (
            {"store": {"break_even_tokens": None, "tokens": 0}},
            "in the KV store",
            "0 of U  (loading never pays here)",
        ),
        ({"fields": {"text": "in another order"}}, "fields", "in another order"),
        ({"warning": "rows are long"}, "warning", "rows are long"),
        ({"advice": {"text": "put the question last"}}, "advice", "put the question last"),
    ],
)
def test_a_plan_has_a_row_for_what_was_found(found: dict[str, Any], name: str, says: str) -> None:
    assert dict(plan_table(PLAN | found))[name] == says
    assert found.keys() & {"peak_kv_bytes", "rows_rejected"} or name not in dict(plan_table(PLAN))


@pytest.mark.parametrize(
    ("found", "name", "says"),
    [
        ({"status": "planning", "rows_read": 1500}, "rows read", "1,500"),
        ({"eta_s": 90.0}, "ETA", "1m30s"),
        ({"audit": "fail"}, "audit", "fail"),
    ],
)
def test_a_status_has_a_row_for_what_is_known(found: dict[str, Any], name: str, says: str) -> None:
    assert dict(status_table(STATUS | found))[name] == says
    assert name not in dict(status_table(STATUS))
    assert dict(status_table(STATUS))["rows"] == "300 of 900 (2 failed)"


def test_a_run_that_is_not_there_yet_is_waited_for() -> None:
    assert status_table({"status": "waiting"}) == [("status", "waiting: there is no run yet")]


@pytest.mark.parametrize(("rows", "said"), [(30, {"free-running": "30 of 30 identical"}), (0, {})])
def test_an_audit_speaks_of_free_runs_where_there_are_some(rows: int, said: dict[str, str]) -> None:
    """Seen red: "0 of 0 identical" of a job that samples."""
    audit = AUDIT | {"free_running": {"rows": rows, "exact": rows, "unexplained": 0}}
    table = dict(audit_table(audit))
    assert {name: told for name, told in table.items() if name == "free-running"} == said
