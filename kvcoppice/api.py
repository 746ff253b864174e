"""What a person calls: a job from a path or a frame to typed results. Holds no logic of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import polars as pl
import pyarrow as pa
from pydantic import BaseModel

from kvcoppice.frames import keep_frame, keep_questions
from kvcoppice.results import Audit, Plan, Report, Run
from pipeline.cli.layers import choices_unless_said, merge_section, split_store
from pipeline.cli.logs import make_observer
from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.settings import AuditSettings, JobSettings
from pipeline.store_settings import ObjectStoreSettings

FsPath: TypeAlias = str | os.PathLike[str]
Prompts: TypeAlias = FsPath | pl.DataFrame | pl.LazyFrame | pa.Table
Progress: TypeAlias = Literal["none", "plain", "auto"]


def plan(prompts: Prompts, *, model: FsPath, **settings: Any) -> Plan:
    """What sharing would save; reads no weights.

    `settings` are those of `coppice plan`, with `_` for `-`. Raises InputError, ModelError,
    UsageError.
    """
    from pipeline.run import plan_job

    return Plan.of(plan_job(_input(prompts), _job(model, settings)))


def run(
    prompts: Prompts,
    output: FsPath,
    *,
    model: FsPath,
    progress: Progress = "none",
    schema: type[BaseModel] | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Answer every row into the run directory `output`; the same call again resumes.

    `settings` are those of `coppice run`, with `_` for `-`. `schema`: a model of pydantic, or a
    JSON schema, that every answer fits; the column `parsed` holds them as values.

    Raises UsageError and its kin before anything ran; TooManyFailedRows when the run is complete;
    TimeBudgetReached, Interrupted, EngineError or StorageError with every committed row intact.
    """
    from pipeline.run import run_job

    job, path = _job(model, settings | _with_schema(schema, settings)), os.fspath(output)
    outcome = run_job(_input(prompts), path, job, make_observer(progress))
    return Run.of(outcome, Location(path, job.store))


def score(
    prompts: Prompts, output: FsPath, *, model: FsPath, progress: Progress = "none", **settings: Any
) -> Run:
    """Score given continuations of every row into `output`; nothing is generated.

    As `run`, with the settings of `coppice score`: what is scored is the column `choices` unless
    `choices_column`, `choices`, `continuation_column`, `prompt_logprobs` or `questions` says
    otherwise; the last is a file, or a mapping of what stands in it.
    """
    asked = settings | choices_unless_said(settings)
    return run(prompts, output, model=model, progress=progress, **asked)


def retry(run: Run | FsPath, *, progress: Progress = "none", **settings: Any) -> Run:
    """Answer rows of a complete run again that failed while they ran, into the same directory.

    `settings` are those of `coppice retry`, with `_` for `-`. Raises as `run`.
    """
    from pipeline.run import retry_job

    others, store = split_store(settings)
    location = _location(run, store)
    return Run.of(retry_job(location, others, make_observer(progress)), location)


def audit(run: Run | FsPath, *, progress: Progress = "none", **settings: Any) -> Audit:
    """Compare rows of a finished run with plain full prefill. A failed audit is a result.

    `settings` are those of `coppice audit`, with `_` for `-`. Raises UsageError, and InputError or
    ModelError if input or model have changed since the run.
    """
    from pipeline.audit.auditing import audit_run, describe_audit

    others, store = split_store(settings)
    chosen = merge_section(AuditSettings, others)
    location = _location(run, store)
    verdict = audit_run(location, chosen, make_observer(progress))
    return Audit.of(verdict, describe_audit(location))


def report(run: Run | FsPath, **settings: Any) -> Report:
    """Write report.html and report.md into the run directory; `settings`: `storage_options`."""
    from pipeline.run import write_report

    location = _location(run, merge_section(ObjectStoreSettings, settings))
    return Report(write_report(location)["page"])


def _job(model: FsPath, settings: dict[str, Any]) -> JobSettings:
    """Raises UsageError naming the field."""
    if isinstance(asked := settings.get("questions"), Mapping):
        settings = settings | {"questions": keep_questions(asked)}
    return JobSettings.from_flat({**settings, "model": os.fspath(model)})


def _with_schema(
    schema: type[BaseModel] | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Raises UsageError."""
    if schema is None:
        return {}
    if settings.get("json_schema") is not None:
        raise UsageError("schema and json_schema exclude each other; leave one of the two out")
    if isinstance(schema, Mapping):
        return {"json_schema": dict(schema)}
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise UsageError("schema is a model of pydantic or a JSON schema as a mapping")
    try:
        return {"json_schema": schema.model_json_schema()}
    except Exception as error:  # whatever a model of the caller raises
        reason = (
            f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else "no reason"
        )
        raise UsageError(f"{schema.__name__} has no JSON schema ({reason}); change it") from error


def _input(prompts: Prompts) -> str:
    """The path of the prompts, which a frame is given one of. Raises StorageError."""
    if isinstance(prompts, str | os.PathLike):
        return os.fspath(prompts)
    return keep_frame(prompts)


def _location(run: Run | FsPath, store: ObjectStoreSettings) -> Location:
    """Where a run is, with these options of its store over those that it was made with."""
    if isinstance(run, Run):
        return replace(run.location, store=run.location.store.overridden_by(store))
    return Location(os.fspath(run), store)
