"""What a person calls: a job from a path or a frame to typed results. Holds no logic of a job."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias

import polars as pl
import pyarrow as pa

from kvcoppice.frames import keep_frame
from kvcoppice.results import Audit, Plan, Report, Run
from pipeline.cli.logs import make_observer
from pipeline.cli.options import merge_section, split_store
from pipeline.settings import AuditSettings, JobSettings, ObjectStoreSettings

Place: TypeAlias = str | os.PathLike[str]
Prompts: TypeAlias = Place | pl.DataFrame | pl.LazyFrame | pa.Table
Progress: TypeAlias = Literal["none", "plain", "auto"]


def plan(prompts: Prompts, *, model: Place, **settings: Any) -> Plan:
    """What sharing would save; reads no weights.

    `settings` are those of `coppice plan`, with `_` for `-`. Raises InputError, ModelError,
    UsageError.
    """
    from pipeline.run import plan_job

    return Plan.of(plan_job(_input(prompts), _job(model, settings)))


def run(
    prompts: Prompts, output: Place, *, model: Place, progress: Progress = "none", **settings: Any
) -> Run:
    """Answer every row into the run directory `output`; the same call again resumes.

    `settings` are those of `coppice run`, with `_` for `-`. Raises UsageError and its kin before
    anything ran; TooManyFailedRows when the run is complete; TimeBudgetReached, Interrupted,
    EngineError or StorageError with every committed row intact.
    """
    from pipeline.run import run_job

    job = _job(model, settings)
    outcome = run_job(_input(prompts), os.fspath(output), job, make_observer(progress))
    return Run.of(outcome, job.store)


def audit(run: Run | Place, *, progress: Progress = "none", **settings: Any) -> Audit:
    """Compare rows of a finished run with plain full prefill. A failed audit is a result.

    `settings` are those of `coppice audit`, with `_` for `-`. Raises UsageError, and InputError or
    ModelError if input or model have changed since the run.
    """
    from pipeline.audit.auditing import audit_run, describe_audit

    others, store = split_store(settings)
    chosen = merge_section(AuditSettings, others)
    place, store = _reached(run, store)
    verdict = audit_run(place, chosen, make_observer(progress), store)
    return Audit.of(verdict, describe_audit(place, store))


def report(run: Run | Place, **settings: Any) -> Report:
    """Write report.html and report.md into the run directory; `settings`: `storage_options`."""
    from pipeline.run import report_run

    place, store = _reached(run, merge_section(ObjectStoreSettings, settings))
    return Report(report_run(place, store))


def _job(model: Place, settings: dict[str, Any]) -> JobSettings:
    """Raises UsageError naming the field."""
    return JobSettings.from_flat({**settings, "model": os.fspath(model)})


def _input(prompts: Prompts) -> str:
    """The path of the prompts, which a frame is given one of. Raises StorageError."""
    if isinstance(prompts, str | os.PathLike):
        return os.fspath(prompts)
    return keep_frame(prompts)


def _reached(run: Run | Place, store: ObjectStoreSettings) -> tuple[str, ObjectStoreSettings]:
    if isinstance(run, Run):
        return run.output, run.store.overridden_by(store)
    return os.fspath(run), store
