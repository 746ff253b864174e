from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest

from pipeline.audit.replay import FreeRun, RowAudit, RowClass, Tier
from pipeline.audit.verdict import (
    GroupCoverage,
    Verdict,
    audit_frame,
    bootstrap_upper,
    describe_similarity,
    judge,
)
from pipeline.binomial import clopper_pearson_upper
from pipeline.settings import AuditSettings

COVERED = GroupCoverage(total=3, covered=3)


def audits(**counts: int) -> list[RowAudit]:
    classes = [name for name, count in counts.items() for _ in range(count)]
    return [_audit(i, name) for i, name in enumerate(classes)]  # type: ignore[arg-type]


def _audit(row_index: int, row_class: RowClass) -> RowAudit:
    divergence = None if row_class == "identical" else 1
    margin = None if divergence is None else 0.25
    return RowAudit(row_index, row_class, divergence, margin, margin, 4, (1, 2, 3, 4), 1.0)


def verdict_of(rows: list[RowAudit], tier: Tier = "exact", least: float = 1.0) -> Verdict:
    return judge(rows, COVERED, tier, AuditSettings(audit_min_exact=least))


@pytest.mark.parametrize("tier", ["exact", "16-bit"])
@pytest.mark.parametrize(
    ("counts", "least", "passes"),
    [
        ({"identical": 10}, 1.0, True),
        ({"identical": 8, "near_tie": 2}, 1.0, True),
        ({"identical": 9, "drift": 1}, 1.0, False),
        ({"identical": 9, "drift": 1}, 0.9, True),
        ({"identical": 8, "drift": 2}, 0.9, False),
        ({"identical": 9, "corrupt": 1}, 0.0, False),
    ],
)
def test_the_gate(tier: Tier, counts: dict[str, int], least: float, passes: bool) -> None:
    verdict = verdict_of(audits(**counts), tier, least)
    assert verdict.passed == passes
    assert bool(verdict.reasons) == (not passes or "drift" in counts)


def test_an_audit_of_nothing_fails() -> None:
    verdict = judge([], GroupCoverage(0, 0), "exact", AuditSettings())
    assert verdict.reasons == ("no row was audited",)
    assert not verdict.passed


def test_an_uncovered_group_fails() -> None:
    verdict = judge(audits(identical=5), GroupCoverage(3, 2), "exact", AuditSettings())
    assert verdict.reasons == ("1 of 3 prefix groups have no audited row",)


def test_a_free_run_may_differ_only_by_a_near_tie() -> None:
    row = audits(identical=1)[0]
    near, wrong = (
        replace(row, free_run=FreeRun((1,), 0, explained)) for explained in (True, False)
    )
    assert verdict_of([near]).passed
    assert not verdict_of([wrong]).passed
    assert verdict_of([near, wrong]).free_exact == 0


@pytest.mark.parametrize(("rows", "bound"), [(59, 0.05), (299, 0.01), (2995, 0.001)])
def test_clean_rows_bound_the_differing_share(rows: int, bound: float) -> None:
    assert clopper_pearson_upper(0, rows) == pytest.approx(1 - 0.05 ** (1 / rows), rel=1e-12)
    assert clopper_pearson_upper(0, rows) <= bound < clopper_pearson_upper(0, rows - 1)


@pytest.mark.parametrize(
    ("differing", "rows", "bound"),
    [(1, 10, 0.39416), (5, 10, 0.77756), (10, 10, 1.0), (0, 0, 1.0), (3, 200, 0.03830)],
)
def test_the_bound_is_that_of_the_tables(differing: int, rows: int, bound: float) -> None:
    assert clopper_pearson_upper(differing, rows) == pytest.approx(bound, abs=1e-4)


def test_the_summary_has_the_fields_of_the_run_directory() -> None:
    verdict = verdict_of(audits(identical=58, near_tie=1))
    summary = verdict.to_json(7, describe_similarity("mini", [1.0, 0.5]))
    assert json.loads(json.dumps(summary)) == summary
    assert summary["classes"] == {"identical": 58, "near_tie": 1, "drift": 0, "corrupt": 0}
    assert (summary["rows_audited"], summary["rows_exact"]) == (59, 58)
    assert summary["exact_rate"] == 58 / 59 and summary["explained_rate"] == 1.0
    assert summary["similarity"] == {"encoder": "mini", "mean": 0.75, "min": 0.5}
    assert summary["tokens_checked"] == 59 * 4
    assert summary["near_tie_bar"] == 1e-3 and summary["hard_bar"] == 0.5
    assert describe_similarity(None, []) == {"encoder": None, "mean": None, "min": None}


def test_the_frame_joins_rows_and_findings() -> None:
    rows = pl.DataFrame(
        {
            "id": ["a", "b"],
            "row_index": [0, 1],
            "group_id": [None, 3],
            "reuse_depth": [0, 40],
            "finish_reason": ["stop", "stop"],
        }
    )
    frame = audit_frame(rows, audits(identical=1, near_tie=1), {1: 0.5}, {0: 1e-9})
    assert frame.columns == [
        "id", "row_index", "audited", "audit_exact", "audit_first_divergence", "audit_margin",
        "audit_similarity", "audit_edit_similarity", "audit_kl", "audit_class",
        "group_id", "reuse_depth", "arm",
    ]  # fmt: skip
    assert frame["audit_exact"].to_list() == [True, False]
    assert frame["audit_similarity"].to_list() == [None, 0.5]
    assert frame["audit_kl"].to_list() == [1e-9, None]
    assert frame["group_id"].to_list() == [None, 3]


def test_rows_of_one_group_count_once_in_the_bound_over_groups() -> None:
    """59 rows of 3 groups and one alone: four draws, not sixty."""
    groups = GroupCoverage(3, 3, {row: row % 3 for row in range(59)} | {59: None})
    clean = judge(audits(identical=60), groups, "exact", AuditSettings()).to_json(7, {})
    assert clean["bound_95"] == clopper_pearson_upper(0, 60)
    assert clean["bound_95_groups"] == clopper_pearson_upper(0, 4) > 0.5
    assert clean["bootstrap_95"] == 0.0
    one = judge(audits(near_tie=1, identical=59), groups, "exact", AuditSettings()).to_json(7, {})
    assert one["bound_95_groups"] == clopper_pearson_upper(1, 4)


def test_the_bootstrap_draws_groups_whole() -> None:
    """One group of ten where all rows differ: the share swings by tenths, not by hundredths."""
    whole = bootstrap_upper([(10, 10)] + [(0, 10)] * 9, 3)
    spread = bootstrap_upper([(1, 10)] * 10, 3)
    assert spread == 0.1 and whole is not None and whole >= 0.2
    assert bootstrap_upper([], 3) is None
