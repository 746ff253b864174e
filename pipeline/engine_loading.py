"""The engine of a job, made while its rows are read: here, or on the workers of a cluster."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from pipeline.engine.base import Engine, EngineFactory
from pipeline.errors import ModelError, UsageError, install_extra
from pipeline.job.device_lock import holding_device
from pipeline.job.job import Job
from pipeline.job.observer import Observer
from pipeline.model.identity import identify_model
from pipeline.model.rates import recall_rates
from pipeline.settings import JobSettings
from pipeline.store_settings import ObjectStoreSettings


@contextmanager
def loading_engine(
    job: Job, make_engine: EngineFactory, observer: Observer, check: Callable[[], None]
) -> Iterator[Future[Engine]]:
    """Wait for the device and load the model, in another thread while this one reads and plans.

    The device is held until the end of the context; while it is waited for, `check` may raise.
    """
    given_up = threading.Event()
    held = ExitStack()

    def load() -> Engine:
        if job.settings.fleet.executor == "local":  # a cluster lends its devices itself
            held.enter_context(holding_device(job.settings, observer, check, given_up))
        executor = make_executor(job, make_engine)
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
