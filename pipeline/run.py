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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine.base import Engine
from pipeline.engine.machine import cache_folder
from pipeline.errors import EngineError, ModelError, UsageError
from pipeline.job.device_lock import holding_device
from pipeline.job.fingerprint import describe_versions, fingerprint_fields, identify_model
from pipeline.job.metrics_export import exporting
from pipeline.job.observer import Observer, SilentObserver
from pipeline.job.outcome import RunOutcome
from pipeline.job.planning import (
    Job,
    PlannedJob,
    open_job,
    plan_for_a_person,
    plan_rows,
    select_rows,
)
from pipeline.job.rates import recall_rates
from pipeline.job.recorded import keep_system_prompt, settings_to_show
from pipeline.job.recycling import expected_hits
from pipeline.job.session import Session
from pipeline.job.stopping import StopRequest, interruptible
from pipeline.job.watchdog import Watchdog
from pipeline.plan.summary import largest_nodes, tree_frame
from pipeline.settings import JobSettings, StoreSettings
from pipeline.storage.durable import replace_file
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_place import Place, check_free, holds_run, reading_run, take_run
from pipeline.storage.writer import encode_parquet

_EXAMPLES = 5


def make_engine(settings: JobSettings) -> Engine:
    """The engine that the settings name, with its model loaded.

    A model that fails the self-test of the prefix engine gets the naive one, which says so. Raises
    ModelError, and UsageError where strict mode cannot be had.
    """
    is_strict = settings.engine.fidelity == "strict"
    if is_strict and settings.model.engine != "prefix":
        raise UsageError(
            "--fidelity strict is a promise of the prefix engine alone; "
            f"leave it out with --engine {settings.model.engine}"
        )
    if settings.model.engine == "echo":
        from pipeline.engine.echo_engine import EchoEngine

        return EchoEngine()
    if settings.model.engine == "vllm":
        from pipeline.engine.vllm_engine import VllmEngine

        return VllmEngine(settings.model, settings.engine)
    from pipeline.engine.model import load_model
    from pipeline.engine.naive_engine import NaiveEngine

    loaded = load_model(settings.model)
    if settings.model.engine == "naive":
        return NaiveEngine(loaded)
    from pipeline.engine.cost_model import calibrated
    from pipeline.engine.prefix_engine import PrefixEngine
    from pipeline.engine.self_test import self_test
    from pipeline.engine.strict_probe import strict_probe

    engine = PrefixEngine(loaded, settings.engine)
    try:
        worst = self_test(engine)
    except EngineError as error:
        if is_strict:
            raise UsageError(f"--fidelity strict: {error}; leave it out") from error
        naive = NaiveEngine(loaded)
        naive.notes.append(f"{error}; so each row is computed in full by the naive engine")
        return naive
    engine.notes.append(f"self-test passed: within {worst:.1e} of the model's own largest logit")
    if is_strict:
        engine.notes.append(f"strict: the same bits in {strict_probe(engine)} of as many ways")
    engine.cost_model = calibrated(loaded, engine.backend)
    return engine


def make_executor(settings: JobSettings) -> Engine:
    """Whatever computes the job's sequences: an engine here, or one that has workers elsewhere.

    Raises what `make_engine` raises, and UsageError without a cluster.
    """
    if settings.fleet.executor == "local":
        return make_engine(settings)
    try:
        from pipeline.executor.ray_crew import RayCrew
    except ModuleNotFoundError as error:
        raise UsageError(
            "--executor ray needs Ray on every machine; run: pip install 'kvcoppice[ray]'"
        ) from error
    from pipeline.executor.fleet import Fleet

    rates = recall_rates(settings.model)
    weight = 1.0 if rates is None else rates.prefill_tokens_per_s / rates.decode_tokens_per_s
    identity = identify_model(settings.model)
    crew = RayCrew(_without_texts(settings), partial(make_worker_engine, identity), weight)
    try:
        return Fleet(crew, weight)
    except BaseException:
        crew.close()
        raise


def make_worker_engine(identity: dict[str, Any], settings: JobSettings) -> Engine:
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
    return settings.model_copy(update={"tokens": tokens, "store": StoreSettings()})


def plan_job(input: str, settings: JobSettings, keep_rows: bool = False) -> PlannedJob:
    """Plan a job and do nothing else; of the model only tokenizer and config are read.

    `keep_rows`: see `plan_rows`; for who runs the job next.
    """
    planned = plan_for_a_person(open_job(input, with_absolute_paths(settings)), keep_rows)
    return replace(planned, summary=replace(planned.summary, store=expected_hits(planned)))


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


def validate_input(input: str, settings: JobSettings) -> dict[str, Any]:
    """Check every row as a job would, and show the first that can run as the model will see it.

    Raises InputError for what no job could start with: columns, types, damaged pages, double ids.
    """
    planned = plan_rows(open_job(input, settings))
    reasons = Counter(rejected.error_type for rejected in planned.rejected.values())
    found: dict[str, Any] = {
        "rows": len(planned.ids),
        "rows_rejected": len(planned.rejected),
        "reasons": dict(reasons.most_common()),
        "examples": [
            {"id": planned.ids[row], "error_type": bad.error_type, "message": bad.message}
            for row, bad in sorted(planned.rejected.items())[:_EXAMPLES]
        ],
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


@interruptible()
def run_job(
    input: str, output: Place, settings: JobSettings, observer: Observer | None = None
) -> RunOutcome:
    """Do the job, or what is left of it; the same call again resumes.

    `input` and `output` may lie below `s3://`; `settings.store` says how to get there.

    Raises UsageError and its kin before anything ran; EngineError, StorageError, Interrupted,
    TimeBudgetReached or Stalled with every committed part intact; TooManyFailedRows after the job
    is sealed. A call of the device or the disk that never returns ends the whole process with exit
    code 1 after `stall_timeout`, see `job/watchdog.py`; a caller who must live on sets it to 0.
    """
    observer = observer or SilentObserver()
    with (
        exporting(observer, settings.monitor, output) as watched,
        Watchdog(settings.write.stall_timeout, watched).watching() as watchdog,
    ):
        return _run_or_resume(input, output, settings, watched, watchdog)


def _run_or_resume(
    input: str, output: Place, settings: JobSettings, observer: Observer, watchdog: Watchdog
) -> RunOutcome:
    stop = StopRequest(settings.write.time_budget)
    settings = with_absolute_paths(settings)
    job = open_job(input, settings)
    fingerprint = fingerprint_fields(settings, job.source.fingerprint(), job.tokenizer.fingerprint)
    description = describe_job(input, job)

    # A folder that refuses this job, or has it done, must say so before an hour of tokenising;
    # a folder that is not there yet is made only when input and model have proved sound, so that
    # a model that is repaired afterwards does not meet the job of the broken one.
    def take() -> RunDirectory:
        copies = cache_folder() / "runs"
        return take_run(output, settings.store, copies, fingerprint, description)

    if holds_run(output, settings.store):
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
            with loading_engine(settings, observer, stop) as loading:
                planned = plan_rows(job)
                return Session(planned, directory, observer, stop, watchdog).run(loading)
    check_free(output, settings.store)
    with loading_engine(settings, observer, stop) as loading:
        planned = plan_rows(job)
        with watchdog.excused():
            loading.result()
        with take() as directory:
            keep_system_prompt(directory, settings)
            return Session(planned, directory, observer, stop, watchdog).run(loading)


def report_run(output: Place, store: StoreSettings | None = None) -> str:
    """Write `report.html` and `report.md` of a run directory; returns the page's path or URL."""
    from pipeline.report.page import render

    with reading_run(output, store or StoreSettings()) as directory:
        render(directory)
        return f"{directory.name}/report.html"


@contextmanager
def loading_engine(
    settings: JobSettings, observer: Observer, stop: StopRequest
) -> Iterator[Future[Engine]]:
    """Wait for the device and load the model, in another thread while this one reads and plans.

    The device is held until the end of the context.
    """
    given_up = threading.Event()
    held = ExitStack()

    def load() -> Engine:
        if settings.fleet.executor == "local":  # a cluster lends its devices itself
            held.enter_context(holding_device(settings, observer, stop.check_budget, given_up))
        executor = make_executor(settings)
        held.callback(getattr(executor, "close", lambda: None))
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
            "argument": input if "://" in input else os.path.abspath(input),
            "rows": job.source.num_rows,
        },
    }
