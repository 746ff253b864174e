"""What the calls of the package return: plain numbers and paths, and frames on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.location import Location
from pipeline.storage.run_location import reading_run

if TYPE_CHECKING:
    from pipeline.audit.verdict import Verdict
    from pipeline.job.outcome import RunOutcome
    from pipeline.job.planning import PlannedJob


@dataclass(frozen=True)
class Plan:
    """What sharing would save. `saving`: the share of prompt tokens that need not be computed.

    `notes`: what else one should know before the run, such as columns that look like settings and
    are none; `summary`: all that `coppice plan --json` says.
    """

    rows: int
    rows_rejected: int
    prompt_tokens: int
    unique_tokens: int
    saving: float
    groups: int
    notes: tuple[str, ...]
    summary: Mapping[str, Any] = field(repr=False, compare=False)
    _planned: PlannedJob = field(repr=False, compare=False)

    @classmethod
    def of(cls, planned: PlannedJob) -> Plan:
        """As a planned job says it."""
        said = planned.summary
        return cls(
            said.rows, said.rows_rejected, said.prompt_tokens, said.unique_tokens, said.saving,
            said.groups, tuple(planned.job.describe()), said.to_json(), planned,
        )  # fmt: skip

    def groups_of_rows(self) -> pl.LazyFrame:
        """A row for each input row: its id, tokens, group, and how many of them it shares."""
        return self._planned.frame().lazy()


@dataclass(frozen=True)
class Run:
    """A finished job. `output`: its run directory; `was_complete`: there was nothing left to do.

    `counters`: all that `coppice status --json` counts; `notes`: what else one should know of it,
    such as columns that look like settings and are none.
    """

    output: str
    rows: int
    rows_ok: int
    rows_failed: int
    was_complete: bool
    notes: tuple[str, ...]
    counters: Mapping[str, float] = field(repr=False, compare=False)
    location: Location = field(repr=False, compare=False)

    @classmethod
    def of(cls, outcome: RunOutcome, location: Location) -> Run:
        """As the job says it; `location`: of its run directory."""
        counters = outcome.counters
        rows, rows_ok = int(counters["rows_in"]), int(counters["rows_ok"])
        return cls(
            outcome.directory, rows, rows_ok, outcome.rows_failed, outcome.was_complete,
            outcome.notes, counters, location,
        )  # fmt: skip

    def answers(self) -> pl.LazyFrame:
        """A row for each input row, in their order: your columns, the answer, what was reused. With
        `explode` a row for each sample.

        Raises StorageError if parts of a run in a bucket cannot be fetched.
        """
        with reading_run(self.location) as directory:
            order = ["row_index", *(["sample_index"] if directory.is_exploded else [])]
            rows = directory.scan_samples().sort(order)
            return rows.collect().lazy() if self.location.is_remote else rows

    def audit(self, **settings: Any) -> Audit:
        """As `kvcoppice.audit` of this run."""
        from kvcoppice.api import audit

        return audit(self, **settings)

    def retry(self, **settings: Any) -> Run:
        """As `kvcoppice.retry` of this run."""
        from kvcoppice.api import retry

        return retry(self, **settings)

    def report(self) -> Report:
        """As `kvcoppice.report` of this run."""
        from kvcoppice.api import report

        return report(self)


@dataclass(frozen=True)
class Audit:
    """What a comparison with plain full prefill found. `reasons`: why it failed, in sentences.

    `summary`: all that `coppice audit --json` says.
    """

    passed: bool
    reasons: tuple[str, ...]
    tier: str
    rows_audited: int
    rows_exact: int
    summary: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, verdict: Verdict, summary: dict[str, Any]) -> Audit:
        """As the audit says it."""
        return cls(
            verdict.passed, verdict.reasons, verdict.tier,
            verdict.rows_audited, verdict.rows_exact, summary,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A page about a run: `page` is the path or URL of report.html."""

    page: str
