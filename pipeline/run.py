"""Wires the stages into a job: the only module that knows their order.

```
 open ─► plan ─► run directory ─► session (engine ─► channel ─► writer) ─► seal
   └──── model loads meanwhile ────────┘
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.costs import NO_COSTS, CostSettings
from pipeline.early_checks import check_early
from pipeline.engine.base import Engine, EngineFactory
from pipeline.engine.load import make_engine
from pipeline.engine_loading import loading_engine
from pipeline.errors import RunDirectoryError
from pipeline.job.advised_plan import plan_for_a_person
from pipeline.job.job import Job, open_job
from pipeline.job.metrics_export import exporting
from pipeline.job.observer import Observer, SilentObserver
from pipeline.job.outcome import RunOutcome
from pipeline.job.planning import PlannedJob, plan_rows
from pipeline.job.planning_watch import PlanningWatch
from pipeline.job.recorded import (
    describe_job,
    keep_system_prompt,
    recall_settings,
    with_absolute_paths,
    with_changes,
    with_recorded_clock,
)
from pipeline.job.recorded_plan import check_plan
from pipeline.job.recycling import expected_hits
from pipeline.job.session import Session
from pipeline.job.stopping import StopRequest, interruptible
from pipeline.job.validation import describe_rows
from pipeline.job.watchdog import Watchdog
from pipeline.location import Location
from pipeline.model.machine import cache_folder
from pipeline.settings import JobSettings
from pipeline.storage.object_store import check_options
from pipeline.storage.retried_rows import begin_retry, failed_in_run, is_retry, take_back
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import holds_run, reading_run, take_run
from pipeline.storage.targets import check_apart


def open_to_run(input: str, run: Location, settings: JobSettings) -> Job:
    """The job of the run directory `run`, there already or not, opened to be planned, run, audited.

    Before a row is read it finds all that can be found wrong; a run that is resumed keeps the clock
    that it recorded. Raises UsageError and its kin.
    """
    settings = with_absolute_paths(settings)
    check_apart(Location(input), run)
    check_early(run, settings)
    return open_job(input, with_recorded_clock(run, settings))


def plan_job(input: str, settings: JobSettings, observer: Observer | None = None) -> PlannedJob:
    """Plan a job and do nothing else; of the model only tokenizer and config are read."""
    check_options(Location(input, settings.store))
    return plan_opened(open_job(input, with_absolute_paths(settings)), observer)


def plan_opened(job: Job, observer: Observer | None = None, keep_rows: bool = False) -> PlannedJob:
    """As `plan_job`, of an opened job. `keep_rows`: see `plan_rows`; for who runs it next."""
    planned = plan_for_a_person(job, keep_rows, (observer or SilentObserver()).show_planning)
    return replace(planned, summary=replace(planned.summary, store=expected_hits(planned)))


def validate_input(
    input: str, settings: JobSettings, observer: Observer | None = None
) -> dict[str, Any]:
    """Check every row as a job would, and show the first that can run as the model will see it.

    Raises InputError for what no job could start with: columns, types, damaged pages, double ids.
    """
    check_options(Location(input, settings.store))
    watch = (observer or SilentObserver()).show_planning
    return describe_rows(plan_rows(open_job(input, settings), watch=watch))


@dataclass(frozen=True)
class _Surroundings:
    """What a job has around it while it runs."""

    watch: PlanningWatch
    watchdog: Watchdog
    stop: StopRequest
    make_engine: EngineFactory


@contextmanager
def _surrounding(
    run: Location,
    settings: JobSettings,
    time_budget_s: float | None,
    observer: Observer | None,
    make_engine: EngineFactory,
) -> Iterator[_Surroundings]:
    with (
        exporting(observer or SilentObserver(), settings, run) as watched,
        Watchdog(settings.write.stall_timeout, watched).watching() as watchdog,
    ):
        watch, stop = PlanningWatch(watched, run), StopRequest(time_budget_s)
        with watch.noting():
            yield _Surroundings(watch, watchdog, stop, make_engine)


@interruptible()
def run_job(
    input: str,
    output: str | Path,
    settings: JobSettings,
    observer: Observer | None = None,
    make_engine: EngineFactory = make_engine,
) -> RunOutcome:
    """Do the job, or what is left of it; the same call again resumes.

    `input` and `output` may lie in a bucket; `settings.store` says how to get there. Workers on a
    cluster get `make_engine` by its name.

    Raises UsageError and its kin before anything ran; EngineError, StorageError, Interrupted,
    TimeBudgetReached or Stalled with every committed part intact; TooManyFailedRows and
    TooManyDegenerate after the job is sealed. A call of the device or the disk that never returns
    ends the whole process with exit code 1 after `stall_timeout`, see `job/watchdog.py`; a caller
    who must live on sets it to 0.
    """
    run, budget_s = Location(output, settings.store), settings.write.time_budget
    check_options(Location(input, settings.store), run)
    with _surrounding(run, settings, budget_s, observer, make_engine) as around:
        return _run_or_resume(open_to_run(input, run, settings), run, around)


@interruptible()
def run_opened(
    job: Job,
    run: Location,
    time_budget_s: float | None,
    observer: Observer | None = None,
    make_engine: EngineFactory = make_engine,
) -> RunOutcome:
    """As `run_job`, of a job that `open_to_run` opened; `time_budget_s` None: no limit."""
    with _surrounding(run, job.settings, time_budget_s, observer, make_engine) as around:
        return _run_or_resume(job, run, around)


def _run_or_resume(
    job: Job, run: Location, around: _Surroundings, retries: bool = False
) -> RunOutcome:
    """`retries`: rows of a complete run that failed while they ran are answered again."""
    observer, watch, settings = around.watch.observer, around.watch, job.settings
    if job.source.summary:
        observer.note(job.source.summary)
    engine = loading_engine(job, around.make_engine, observer, around.stop.check_budget)

    # A folder that refuses this job, or has it done, must say so before an hour of tokenising;
    # a folder that is not there yet is made only when input and model have proved sound, so that
    # a model that is repaired afterwards does not meet the job of the broken one.
    def take() -> RunDirectory:
        held = (cache_folder() / "runs", job.fingerprint, describe_job(job))
        return take_run(run, *held, with_parts=retries)

    if holds_run(run):
        with take() as directory:
            return _go_on(job, directory, around, engine, retries)
    with engine as loading:
        planned = plan_rows(job, watch=watch.until_failure(loading))
        with around.watchdog.excused():
            loading.result()
        with take() as directory:
            keep_system_prompt(directory, settings)
            return _sit(planned, directory, loading, around)


def _go_on(
    job: Job,
    directory: RunDirectory,
    around: _Surroundings,
    engine: AbstractContextManager[Future[Engine]],
    retries: bool,
) -> RunOutcome:
    """A run that has begun: complete, or to be completed."""
    observer, is_sealed = around.watch.observer, directory.is_sealed
    if not is_sealed and retries and not is_retry(directory):
        directory.check_complete()
    is_whole = is_sealed and directory.is_whole
    if is_whole and not (retries and len(failed_in_run(directory))):
        return _find_complete(directory, around, job.settings)
    if is_sealed and not is_whole:
        observer.note(f"{directory.name} was complete, but files are missing; they are made again")
        rows = directory.planned_rows()
        counted = directory.read_manifest()["counters"].get("rows_in")
        expected = counted if rows is None else len(rows)
        directory.unseal(with_audit=len(directory.done_rows()) != expected)
    keep_system_prompt(directory, job.settings)
    with engine as loading:
        planned = plan_rows(job, watch=around.watch.until_failure(loading))
        if is_sealed and retries:
            check_plan(planned, directory)
            with around.watchdog.excused():
                loading.result()  # a model that cannot be loaded leaves the run complete
            left = begin_retry(directory, planned.rejected)
            if is_whole and not left:
                return _find_complete(directory, around, job.settings)
            refused = len(np.intersect1d(list(planned.rejected), planned.rows))
            observer.say(f"{left} failed rows are computed again; {refused} stay refused")
        take_back(directory)
        return _sit(planned, directory, loading, around)


def _find_complete(
    directory: RunDirectory, around: _Surroundings, settings: JobSettings
) -> RunOutcome:
    around.watch.observer.say(f"{directory.name} is complete; nothing to do")
    outcome = RunOutcome.of_sealed(directory, settings.cost)
    outcome.check(settings)
    return outcome


def _sit(
    planned: PlannedJob, directory: RunDirectory, loading: Future[Engine], around: _Surroundings
) -> RunOutcome:
    around.watch.finish()
    session = Session(planned, directory, around.watch.observer, around.stop, around.watchdog)
    return session.run(loading)


@interruptible()
def retry_job(
    run: Location,
    changes: Mapping[str, Any],
    observer: Observer | None = None,
    make_engine: EngineFactory = make_engine,
) -> RunOutcome:
    """Answer the rows of a complete run again that failed while they ran, into the same directory;
    the same call again goes on with a retry that was stopped.

    The job is the one that the run recorded; `changes`: settings that decide no answer, flat.
    Raises as `run_job`, RunDirectoryError where there is no run or one that is not complete.
    """
    with reading_run(run, parts=False) as directory:
        settings = with_changes(recall_settings(directory), changes, run.store)
        named = directory.read_manifest().get("input", {})
    if "argument" not in named:
        raise RunDirectoryError(f"{run} does not say how it was made; run the job again")
    budget_s = settings.write.time_budget
    with _surrounding(run, settings, budget_s, observer, make_engine) as around:
        job = open_to_run(named["argument"], run, settings)
        return _run_or_resume(job, run, around, retries=True)


def read_outcome(run: Location) -> RunOutcome:
    """What became of a job that is complete. Raises RunDirectoryError, StorageError."""
    with reading_run(run) as directory:
        return RunOutcome.of_sealed(directory)


def write_report(run: Location, price: CostSettings = NO_COSTS) -> dict[str, str]:
    """Write `report.html` and `report.md`; returns `page`, its path or URL, and `summary`, text.

    `price`: over the one that the run recorded.
    """
    from pipeline.report.page import render

    with reading_run(run) as directory:
        render(directory, price)
        summary = (directory.root / "report.md").read_text(encoding="utf-8")
        return {"page": f"{directory.name}/report.html", "summary": summary}
