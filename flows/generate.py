"""The main job as a flow: plan and generate, resumed by Prefect's own retry.

A job that stalls and comes back is retried; one stuck in a call that never returns ends the process
of the flow, which a worker reports as crashed. Run flows in processes of their own, as workers do.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.artifacts import PrefectObserver
from flows.privacy import whole_settings, without_text
from pipeline.errors import (
    AuditFailed,
    Interrupted,
    TimeBudgetReached,
    TooManyFailedRows,
    UsageError,
)
from pipeline.run import run_job
from pipeline.settings import JobSettings

_NEVER_RETRIED = (UsageError, TooManyFailedRows, AuditFailed, TimeBudgetReached, Interrupted)


async def is_worth_a_retry(tried: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """A fault of device or disk is; a wrong call, or a stop that was asked for, is not."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, _NEVER_RETRIED)


@task(
    name="generate",
    retries=1,
    retry_condition_fn=is_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def generate_rows(input: str, output: str, settings: dict[str, Any]) -> dict[str, float]:
    """Run or resume the job; returns its counters. A retry goes on where the last try stopped."""
    with without_text(), PrefectObserver() as observer:
        job = JobSettings.from_flat(whole_settings(settings))
        return run_job(input, output, job, observer).counters


@flow(name="coppice-generate", persist_result=False)
def generate(input: str, output: str, settings: dict[str, Any]) -> dict[str, float]:
    """Generate an answer for every row of `input` into `output`.

    `settings` by flag names, and `config`, the path of a YAML file of more of them: Prefect keeps
    what is passed here, and not what stands there.
    """
    return generate_rows(input, output, settings)
