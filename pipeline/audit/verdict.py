"""The verdict: what audited rows must show. Pure arithmetic; knows no files, models or texts.

The rule, the same in both tiers; they differ only in how near a near-tie is (`replay.BARS`):

1. at least one row was audited, and at least one of every prefix group;
2. no row is `corrupt`: that is never a matter of rounding;
3. the share of rows that are `identical` or `near_tie` is at least `audit_min_exact`. A near-tie is
   an *explained* difference: the baseline itself could not tell the two tokens apart. At the
   default of 1.0 not one row may drift; a lower bar was asked for by the user, and lets a few;
4. no free-running answer differs from ours, except from a near-tie on;
5. the other arms and the planted faults, where they were run, show what `arms` asks of them.

`bound_95` is no rule but what the sample can promise: with 95 % confidence, at most that share
of all rows differs in any token (near-ties counted). It takes rows as independent; rows of one
group share a prefix and are not, which is why rule 1 asks for every group. `bound_95_groups` is the
same bound over groups (a row without one is its own), and `bootstrap_95` the 95 % quantile of the
differing share when whole groups are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import polars as pl

from pipeline.audit.evidence import NO_EVIDENCE, Evidence
from pipeline.audit.replay import BARS, ROW_CLASSES, RowAudit, RowClass, Tier
from pipeline.binomial import CONFIDENCE, clopper_pearson_upper
from pipeline.engine.base import Deviation
from pipeline.errors import AuditFailed
from pipeline.settings import AuditSettings

_BOOTSTRAPS: Final = 2000
_FRAME_SCHEMA: Final = {
    "row_index": pl.Int64,
    "audited": pl.Boolean,
    "audit_exact": pl.Boolean,
    "audit_first_divergence": pl.Int64,
    "audit_margin": pl.Float64,
    "audit_similarity": pl.Float64,
    "audit_edit_similarity": pl.Float64,
    "audit_kl": pl.Float64,
    "audit_class": pl.String,
    "arm": pl.String,
}
_ATTENTION_SCHEMA: Final = {
    "row_index": pl.Int64,
    "audit_full_same": pl.Boolean,
    "audit_full_divergence": pl.Int64,
    "audit_full_kl": pl.Float64,
    "audit_full_top1": pl.Float64,
}


@dataclass(frozen=True)
class GroupCoverage:
    """Prefix groups that have a row to audit, and those of them that got one audited.

    `group_of`: of each audited `row_index`, None where it has no group.
    """

    total: int
    covered: int
    group_of: Mapping[int, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, candidates: pl.DataFrame, chosen: pl.DataFrame) -> GroupCoverage:
        """Count the distinct `group_id` of both; null is no group."""
        total, covered = (f["group_id"].drop_nulls().n_unique() for f in (candidates, chosen))
        return cls(total, covered, dict(chosen.select("row_index", "group_id").iter_rows()))

    def differing(self, audits: Sequence[RowAudit]) -> tuple[tuple[int, int], ...]:
        """(rows that differ, rows) of each group that was audited; a row without one is its own."""
        counts: dict[tuple[str, int], list[int]] = {}
        for audit in audits:
            group = self.group_of.get(audit.row_index)
            key = ("row", audit.row_index) if group is None else ("group", group)
            count = counts.setdefault(key, [0, 0])
            count[0] += not audit.exact
            count[1] += 1
        return tuple((differing, rows) for differing, rows in counts.values())


@dataclass(frozen=True)
class Verdict:
    """What an audit found. `reasons`: why it failed, or what was let pass, one sentence each.

    `groups_differing`: of each audited group (rows that differ, rows).
    """

    verdict: Literal["pass", "fail"]
    reasons: tuple[str, ...]
    tier: Tier
    classes: Mapping[RowClass, int]
    groups_total: int
    groups_covered: int
    free_rows: int
    free_exact: int
    free_unexplained: int
    tokens_checked: int
    groups_differing: tuple[tuple[int, int], ...]
    evidence: Evidence

    def check(self, run: object) -> None:
        """Raises AuditFailed, of this run, unless it passed."""
        if not self.passed:
            raise AuditFailed(f"the audit of {run} failed: {'; '.join(self.reasons)}")

    @property
    def passed(self) -> bool:
        """Whether the run may be published."""
        return self.verdict == "pass"

    @property
    def rows_audited(self) -> int:
        return sum(self.classes.values())

    @property
    def rows_exact(self) -> int:
        return self.classes["identical"]

    def to_json(self, seed: int, similarity: Mapping[str, Any]) -> dict[str, Any]:
        """`audit/summary.json` without its times; `similarity` as from `describe_similarity`."""
        audited, exact = self.rows_audited, self.rows_exact
        explained = exact + self.classes["near_tie"]
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "tier": self.tier,
            "rows_audited": audited,
            "rows_exact": exact,
            "exact_rate": exact / audited if audited else None,
            "explained_rate": explained / audited if audited else None,
            "bound_95": clopper_pearson_upper(audited - exact, audited),
            "bound_95_groups": clopper_pearson_upper(
                sum(differing > 0 for differing, _ in self.groups_differing),
                len(self.groups_differing),
            ),
            "bootstrap_95": bootstrap_upper(self.groups_differing, seed),
            "classes": dict(self.classes),
            "groups_total": self.groups_total,
            "groups_covered": self.groups_covered,
            "free_running": {
                "rows": self.free_rows,
                "exact": self.free_exact,
                "unexplained": self.free_unexplained,
            },
            "similarity": dict(similarity),
            "near_tie_bar": BARS[self.tier].near_tie,
            "hard_bar": BARS[self.tier].hard,
            "tokens_checked": self.tokens_checked,
            **self.evidence.to_json(),
            "seed": seed,
        }


def judge(
    audits: Sequence[RowAudit],
    groups: GroupCoverage,
    tier: Tier,
    settings: AuditSettings,
    evidence: Evidence = NO_EVIDENCE,
) -> Verdict:
    """Apply the rule of the module to the audited rows."""
    classes = {name: sum(a.row_class == name for a in audits) for name in ROW_CLASSES}
    free_runs = [audit.free_run for audit in audits if audit.free_run is not None]
    unexplained = sum(not run.explained for run in free_runs)
    share = (classes["identical"] + classes["near_tie"]) / len(audits) if audits else 0.0
    least = settings.audit_min_exact
    failures = {
        "no row was audited": not audits,
        f"{groups.total - groups.covered} of {groups.total} prefix groups have no audited row": (
            groups.covered < groups.total
        ),
        f"{classes['corrupt']} of {len(audits)} rows are corrupt": classes["corrupt"] > 0,
        f"{share:.2%} of the rows are identical or near-ties, below the bar of {least:.2%}": (
            bool(audits) and share < least
        ),
        f"{unexplained} of {len(free_runs)} free-running answers differ without a near-tie": (
            unexplained > 0
        ),
    }
    failed = tuple(reason for reason, holds in failures.items() if holds)
    failed += tuple(evidence.failures(tier))
    let_pass = (f"{classes['drift']} of {len(audits)} rows drift; the lowered bar lets them pass",)
    return Verdict(
        verdict="fail" if failed else "pass",
        reasons=failed or (let_pass if classes["drift"] else ()),
        tier=tier,
        classes=classes,
        groups_total=groups.total,
        groups_covered=groups.covered,
        free_rows=len(free_runs),
        free_exact=sum(run.first_divergence is None for run in free_runs),
        free_unexplained=unexplained,
        tokens_checked=sum(audit.tokens_checked for audit in audits),
        groups_differing=groups.differing(audits),
        evidence=evidence,
    )


def bootstrap_upper(groups: Sequence[tuple[int, int]], seed: int) -> float | None:
    """95 % quantile of the differing share when as many groups are drawn again, with replacement.

    `groups`: (rows that differ, rows) each. None without a group. Zero where no row differs:
    then `clopper_pearson_upper` is what can be said.
    """
    if not groups:
        return None
    counts = np.array(groups, np.float64)
    random = np.random.default_rng(seed)
    drawn = counts[random.integers(0, len(counts), (_BOOTSTRAPS, len(counts)))].sum(axis=1)
    return float(np.quantile(drawn[:, 0] / drawn[:, 1], CONFIDENCE))


def audit_frame(
    rows: pl.DataFrame,
    audits: Sequence[RowAudit],
    similarity: Mapping[int, float],
    kl: Mapping[int, float],
    attention: Mapping[int, Deviation] = MappingProxyType({}),
) -> pl.DataFrame:
    """The content of `audit/audit.parquet`, one line a chosen row.

    `rows`: as from `choose_rows`; by `row_index`, for the rows that have one: `similarity`, cosine
    of the texts, and `kl`, the largest divergence of the product's distributions from the
    baseline's, nats; `attention`: how far what rows saw instead is from full attention,
    in columns of its own where there is any.
    """
    found = pl.DataFrame(
        [
            {
                "row_index": audit.row_index,
                "audited": True,
                "audit_exact": audit.exact,
                "audit_first_divergence": audit.first_divergence,
                "audit_margin": audit.margin,
                "audit_similarity": similarity.get(audit.row_index),
                "audit_edit_similarity": audit.edit_similarity,
                "audit_kl": kl.get(audit.row_index),
                "audit_class": audit.row_class,
                "arm": "replay" if audit.free_run is None else "replay+free-running",
            }
            for audit in audits
        ],
        schema=_FRAME_SCHEMA,
    )
    keys = rows.select("id", "row_index", "group_id", "reuse_depth")
    columns = ["id", *(name for name in _FRAME_SCHEMA if name != "arm")]
    frame = keys.join(found, on="row_index").select(*columns, "group_id", "reuse_depth", "arm")
    if not attention:
        return frame
    return frame.join(_attention_frame(attention), on="row_index", how="left")


def _attention_frame(attention: Mapping[int, Deviation]) -> pl.DataFrame:
    rows = [
        {
            "row_index": row_index,
            "audit_full_same": not found.differs.any(),
            "audit_full_divergence": int(found.differs.argmax()) if found.differs.any() else None,
            "audit_full_kl": float(found.kl.mean()),
            "audit_full_top1": float(1.0 - found.differs.mean()),
        }
        for row_index, found in attention.items()
    ]
    return pl.DataFrame(rows, schema=_ATTENTION_SCHEMA)


def describe_similarity(encoder: str | None, similarity: Sequence[float]) -> dict[str, Any]:
    """The `similarity` entry of the summary; mean and min are None when nothing was compared."""
    return {
        "encoder": encoder,
        "mean": math.fsum(similarity) / len(similarity) if similarity else None,
        "min": min(similarity, default=None),
    }
