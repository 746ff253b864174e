"""Wires the stages into a job: the only module that knows their order.

```
 open ─► plan ─► run directory ─► session (engine ─► channel ─► writer) ─► seal
   └──── model loads meanwhile ────────┘
```
"""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.early_checks import check_early
from pipeline.engine.base import Engine, EngineFactory
from pipeline.engine.load import make_engine
from pipeline.errors import ModelError, UsageError, install_extra
from pipeline.job.device_lock import holding_device
from pipeline.job.metrics_export import exporting
from pipeline.job.observer import Observer, SilentObserver
from pipeline.job.outcome import RunOutcome
from pipeline.job.planning import (
    Job,
    PlannedJob,
    open_job,
    plan_for_a_person,
    plan_rows,
    sample_prompts,
    select_rows,
)
from pipeline.job.planning_watch import PlanningWatch
from pipeline.job.recorded import keep_system_prompt, settings_to_show, with_recorded_clock
from pipeline.job.recycling import expected_hits
from pipeline.job.session import Session
from pipeline.job.stopping import StopRequest, interruptible
from pipeline.job.watchdog import Watchdog
from pipeline.location import Location
from pipeline.model.identity import describe_versions, identify_model
from pipeline.model.machine import cache_folder
from pipeline.model.rates import recall_rates
from pipeline.plan.summary import largest_nodes, tree_frame
from pipeline.settings import JobSettings, ObjectStoreSettings
from pipeline.storage.durable import replace_file
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import holds_run, reading_run, take_run
from pipeline.storage.targets import check_apart, check_replaceable, folder_to_write
from pipeline.storage.writer import encode_parquet


def make_executor(job: Job, make_engine: EngineFactory) -> Engine:
    """Whatever computes the job's sequences: an engine here, or one that has workers elsewhere.

    Raises what `make_engine` raises, and UsageError without a cluster.
    """
    settings = job.settings
    if settings.fleet.executor == "local":
        return make_engine(settings)
    try:
        from pipeline.executor.ray_crew import RayCrew
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--executor ray needs Ray on every machine; {install_extra('ray')}"
        ) from error
    from pipeline.executor.fleet import Fleet

    rates = recall_rates(settings.model, job.model_identity)
    weight = 1.0 if rates is None else rates.prefill_tokens_per_s / rates.decode_tokens_per_s
    make = partial(make_worker_engine, make_engine, job.model_identity)
    crew = RayCrew(_without_texts(settings), make, weight)
    try:
        return Fleet(crew, weight)
    except BaseException:
        crew.close()
        raise


def make_worker_engine(
    make_engine: EngineFactory, identity: dict[str, Any], settings: JobSettings
) -> Engine:
    """The engine of a worker, on its own machine. Raises ModelError if the model there is another
    one than the driver's, by `identify_model`."""
    if identify_model(settings.model) != identity:
        raise ModelError(
            f"{settings.model.model} on {platform.node()} is not the model of the machine that "
            "began the job; bring the same files to every machine"
        )
    return make_engine(settings)


def _without_texts(settings: JobSettings) -> JobSettings:
    """What a worker needs: no secret of a store and no system prompt goes to a cluster."""
    tokens = settings.tokens.model_copy(update={"system_prompt": None})
    return settings.model_copy(update={"tokens": tokens, "store": ObjectStoreSettings()})


def plan_job(
    input: str, settings: JobSettings, keep_rows: bool = False, observer: Observer | None = None
) -> PlannedJob:
    """Plan a job and do nothing else; of the model only tokenizer and config are read.

    `keep_rows`: see `plan_rows`; for who runs the job next.
    """
    watch = (observer or SilentObserver()).show_planning
    planned = plan_for_a_person(open_job(input, with_absolute_paths(settings)), keep_rows, watch)
    return replace(planned, summary=replace(planned.summary, store=expected_hits(planned)))


def check_plan_targets(folder: Path | None, page: Path | None) -> None:
    """Raises UsageError where `write_plan` or `write_plan_page` would replace another's file."""
    if page is not None:
        check_replaceable(page, [b"<!DOCTYPE html", b"<!doctype html"], "--html")
    for option, path in (("-o", folder), ("--html", page and page.parent)):
        why_not = path and folder_to_write(path)[1]
        if why_not:
            raise UsageError(f"cannot write to {path}: {why_not}; choose another {option}")
    if folder is None or not (folder / "plan.parquet").exists():
        return
    try:
        is_ours = "plan_hash" in json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UsageError(
            f"{folder / 'plan.parquet'} is there and no plan of coppice; choose another -o"
        )


def write_plan(planned: PlannedJob, folder: Path) -> None:
    """Write plan.parquet, tree.parquet and summary.json into `folder`, outside of any run.

    Raises StorageError.
    """
    frames = {"plan": planned.frame(), "tree": tree_frame(planned.plan)}
    for name, frame in frames.items():
        replace_file(folder / f"{name}.parquet", memoryview(encode_parquet(frame.to_arrow())))
    summary = json.dumps(planned.summary.to_json(), indent=2, ensure_ascii=False)
    replace_file(folder / "summary.json", f"{summary}\n".encode())


def write_plan_page(planned: PlannedJob, title: str, path: Path) -> None:
    """Write the plan as one HTML page."""
    from pipeline.report.plan_page import render_plan
    from pipeline.report.tree import Box

    boxes = [Box(*node) for node in largest_nodes(planned.plan).tolist()]
    page = render_plan(title, planned.summary.to_json(), boxes, planned.plan.tree.num_nodes)
    replace_file(path.absolute(), page.encode())


def validate_input(
    input: str, settings: JobSettings, observer: Observer | None = None
) -> dict[str, Any]:
    """Check every row as a job would, and show the first that can run as the model will see it.

    Raises InputError for what no job could start with: columns, types, damaged pages, double ids.
    """
    watch = (observer or SilentObserver()).show_planning
    planned = plan_rows(open_job(input, settings), watch=watch)
    rejections = planned.summary.rejections or {"reasons": {}, "examples": []}
    found: dict[str, Any] = {
        "rows": len(planned.ids),
        "rows_rejected": len(planned.rejected),
        **rejections,
        "notes": planned.job.source.columns.describe(),
        "warning": planned.job.tokenizer.looks_rendered(sample_prompts(planned)),
        "first": None,
    }
    runs = np.flatnonzero(planned.plan.sequence_of_row >= 0)
    if len(runs):
        first = int(runs[0])
        content = select_rows(planned.job, [first]).contents[0]
        assert content is not None
        found["first"] = {
            "id": planned.ids[first],
            "rendered": planned.job.tokenizer.render(content),
            "token_ids": planned.plan.table[first].tolist(),
        }
    return found


@dataclass(frozen=True)
class _Surroundings:
    """What a job has around it while it runs."""

    watch: PlanningWatch
    watchdog: Watchdog
    stop: StopRequest
    make_engine: EngineFactory


@interruptible()
def run_job(
    input: str,
    output: str | Path,
    settings: JobSettings,
    observer: Observer | None = None,
    make_engine: EngineFactory = make_engine,
) -> RunOutcome:
    """Do the job, or what is left of it; the same call again resumes.

    `input` and `output` may lie below `s3://`; `settings.store` says how to get there. Workers on a
    cluster get `make_engine` by its name.

    Raises UsageError and its kin before anything ran; EngineError, StorageError, Interrupted,
    TimeBudgetReached or Stalled with every committed part intact; TooManyFailedRows after the job
    is sealed. A call of the device or the disk that never returns ends the whole process with exit
    code 1 after `stall_timeout`, see `job/watchdog.py`; a caller who must live on sets it to 0.
    """
    observer = observer or SilentObserver()
    run = Location(output, settings.store)
    with (
        exporting(observer, settings.monitor, run) as watched,
        Watchdog(settings.write.stall_timeout, watched).watching() as watchdog,
    ):
        stop = StopRequest(settings.write.time_budget)
        watch = PlanningWatch(watched, run)
        around = _Surroundings(watch, watchdog, stop, make_engine)
        return _run_or_resume(input, run, with_absolute_paths(settings), around)


def _run_or_resume(
    input: str, output: Location, settings: JobSettings, around: _Surroundings
) -> RunOutcome:
    with around.watch.noting():
        return _plan_and_run(input, output, settings, around)


def _plan_and_run(
    input: str, output: Location, settings: JobSettings, around: _Surroundings
) -> RunOutcome:
    observer, watch = around.watch.observer, around.watch
    check_apart(Location(input), output)
    check_early(output, settings)
    settings = with_recorded_clock(output, settings)
    job = open_job(input, settings)
    settings = job.settings
    if job.source.summary:
        observer.say(job.source.summary)
    description = describe_job(input, job)

    # A folder that refuses this job, or has it done, must say so before an hour of tokenising;
    # a folder that is not there yet is made only when input and model have proved sound, so that
    # a model that is repaired afterwards does not meet the job of the broken one.
    def take() -> RunDirectory:
        copies = cache_folder() / "runs"
        return take_run(output, copies, job.fingerprint, description)

    if holds_run(output):
        with take() as directory:
            if directory.is_sealed:
                if directory.is_whole:
                    observer.say(f"{output} is complete; nothing to do")
                    outcome = RunOutcome.of_sealed(directory)
                    outcome.check_failures(settings.write)
                    return outcome
                observer.say(f"{output} was complete, but files are missing; they are made again")
                rows = directory.planned_rows()
                counted = directory.read_manifest()["counters"].get("rows_in")
                expected = counted if rows is None else len(rows)
                directory.unseal(with_audit=len(directory.done_rows()) != expected)
            keep_system_prompt(directory, settings)
            with loading_engine(job, around) as loading:
                planned = plan_rows(job, watch=watch.until_failure(loading))
                return _sit(planned, directory, loading, around)
    with loading_engine(job, around) as loading:
        planned = plan_rows(job, watch=watch.until_failure(loading))
        with around.watchdog.excused():
            loading.result()
        with take() as directory:
            keep_system_prompt(directory, settings)
            return _sit(planned, directory, loading, around)


def _sit(
    planned: PlannedJob, directory: RunDirectory, loading: Future[Engine], around: _Surroundings
) -> RunOutcome:
    around.watch.finish()
    session = Session(planned, directory, around.watch.observer, around.stop, around.watchdog)
    return session.run(loading)


def report_run(run: Location) -> str:
    """Write `report.html` and `report.md` of a run directory; returns the page's path or URL."""
    return write_report(run)["page"]


def write_report(run: Location) -> dict[str, str]:
    """As `report_run`; returns `page`, its path or URL, and `summary`, its Markdown."""
    from pipeline.report.page import render

    with reading_run(run) as directory:
        render(directory)
        summary = (directory.root / "report.md").read_text(encoding="utf-8")
        return {"page": f"{directory.name}/report.html", "summary": summary}


@contextmanager
def loading_engine(job: Job, around: _Surroundings) -> Iterator[Future[Engine]]:
    """Wait for the device and load the model, in another thread while this one reads and plans.

    The device is held until the end of the context.
    """
    given_up = threading.Event()
    held = ExitStack()

    def load() -> Engine:
        if job.settings.fleet.executor == "local":  # a cluster lends its devices itself
            check = around.stop.check_budget
            held.enter_context(holding_device(job.settings, around.watch.observer, check, given_up))
        executor = make_executor(job, around.make_engine)
        held.callback(executor.close)
        return executor

    pool = ThreadPoolExecutor(1, thread_name_prefix="model")
    loading = pool.submit(load)
    try:
        yield loading
    finally:
        given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)
        loading.add_done_callback(lambda _: held.close())  # at once, or when the load comes back


def with_absolute_paths(settings: JobSettings) -> JobSettings:
    """Settings that mean the same from any working directory: they are recorded and read again."""
    model, tokens, read = settings.model, settings.tokens, settings.read
    if Path(model.model).is_dir():
        model = model.model_copy(update={"model": os.path.abspath(model.model)})
    if tokens.chat_template is not None:
        tokens = tokens.model_copy(update={"chat_template": tokens.chat_template.absolute()})
    if read.template is not None:
        read = read.model_copy(update={"template": read.template.absolute()})
    return settings.model_copy(update={"model": model, "tokens": tokens, "read": read})


def describe_job(input: str, job: Job) -> dict[str, Any]:
    """What `run.json` says about a job besides its fingerprint; paths are meant for the audit."""
    return {
        "settings": settings_to_show(job.settings),
        "versions": describe_versions(),
        "device": {
            "asked_for": job.settings.model.device,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "input": {
            "argument": Location(input).absolute,
            "rows": job.source.num_rows,
            "files": job.source.summary or "1 file is read",
        },
    }
