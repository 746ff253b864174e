"""The steps of a night. Each may be repeated, and returns numbers and paths, never text.

A step knows only the opened job and its run directory: whoever calls it (cron's command, a flow)
decides what comes next and whom to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.audit.auditing import audit_opened, describe_audit
from pipeline.audit.gate import current_verdict
from pipeline.errors import InputError, TimeBudgetReached
from pipeline.job.observer import Observer
from pipeline.night.opened_job import OpenedJob
from pipeline.night.publication import check_target, publish_run
from pipeline.night.settings import Night
from pipeline.run import plan_opened, run_opened, write_report
from pipeline.storage.run_location import holds_run, reading_run
from pipeline.storage.summaries import PLAN_SUMMARY

Step = Callable[[], dict[str, Any]]
Call = Callable[[str, Night, Step], dict[str, Any]]
"""Calls a step of a night, which it is told the name of; a flow makes a task of it."""


def directly(name: str, night: Night, step: Step) -> dict[str, Any]:
    """Call the step and nothing else."""
    return step()


def check_input(opened: OpenedJob) -> dict[str, Any]:
    """Whatever can be found wrong before a row is read: input, model, output, what is installed.

    Raises NoInput where there is nothing to do, InputError, ModelError, UsageError, StorageError.
    """
    night = opened.night
    folder = night.awaited_folder
    if folder is not None and not folder.exists():
        raise InputError(f"there is no folder {folder}; is its disk mounted?")
    if night.target is not None:
        check_target(night.run, night.target, night.date)
    with opened.passed_on() as job:
        return {"input": night.input, "rows": job.source.num_rows}


def plan_night(opened: OpenedJob, observer: Observer) -> dict[str, Any]:
    """Rows, tokens and the saving; of a night that was begun as it began. Raises as `plan_job`."""
    summary = _recorded_plan(opened.night)
    if summary is None:
        with opened.passed_on() as job:
            summary = plan_opened(job, observer, keep_rows=True).summary.to_json()
    estimate = summary["estimate"]
    return {
        "rows": summary["rows"],
        "rows_rejected": summary["rows_rejected"],
        "prompt_tokens": summary["prompt_tokens"],
        "unique_tokens": summary["unique_tokens"],
        "saving": summary["saving"],
        "groups": summary["groups"],
        "expected_s": estimate and estimate["prefill_s"] + estimate["decode_s"],
    }


def generate_night(
    opened: OpenedJob, observer: Observer, time_budget_s: float | None
) -> dict[str, Any]:
    """Answer what is left; returns the run's counters. `time_budget_s` None: no limit.

    Raises as `run_job`: TooManyFailedRows or TooManyDegenerate with the run complete,
    TimeBudgetReached, FolderInUse.
    """
    if time_budget_s is not None and time_budget_s <= 0:
        raise TimeBudgetReached(
            f"the time budget was spent before the night of {opened.night.date} began; the next "
            "one finishes it"
        )
    with opened.passed_on() as job:
        return run_opened(job, opened.night.run, time_budget_s, observer).counters


def audit_night(opened: OpenedJob, observer: Observer) -> dict[str, Any]:
    """Audit the run, unless it passed as it is now. Raises AuditFailed below the bar."""
    night = opened.night
    with reading_run(night.run, parts=False) as directory:
        is_passed = directory.is_sealed and current_verdict(directory, night.job.audit) == "pass"
    if not is_passed:
        with opened.passed_on() as job:
            verdict = audit_opened(job, night.run, night.job.audit, observer)
        verdict.check(night.run)
    summary = describe_audit(night.run)
    names = ("verdict", "tier", "rows_audited", "rows_exact", "bound_95")
    return {name: summary.get(name) for name in names}


def report_night(night: Night) -> dict[str, Any]:
    """Write the report: `page` is its path or URL, `summary` its Markdown."""
    return dict(write_report(night.run))


def publish_night(night: Night) -> dict[str, Any]:
    """Publish the run where the settings say so. Raises AuditFailed, as `publish_run`."""
    if night.target is None:
        return {"published": None, "parts": 0, "rows": 0}
    done = publish_run(night.run, night.target, night.settings.name, night.date, night.job.audit)
    return {"published": done.location, "parts": done.parts, "rows": done.rows}


def _recorded_plan(night: Night) -> dict[str, Any] | None:
    if not holds_run(night.run):
        return None
    with reading_run(night.run, parts=False) as directory:
        return PLAN_SUMMARY.read(directory.root)
