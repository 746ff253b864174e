"""The main job as a flow: plan and generate, resumed by Prefect's own retry.

A job that stalls and comes back is retried; one stuck in a call that never returns ends the process
of the flow, which a worker reports as crashed. Run flows in processes of their own, as workers do.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from flows.privacy import whole_settings, without_text
from pipeline.errors import Interrupted, TimeBudgetReached, TooManyFailedRows, UsageError
from pipeline.job.observer import Snapshot
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.terminal.progress import plain_line

_LOG_EVERY_ROWS_SHARE = 0.1
_NEVER_RETRIED = (UsageError, TooManyFailedRows, TimeBudgetReached, Interrupted)


class LoggingObserver:
    """Tells Prefect's log what a terminal would see: counts and rates, never text."""

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._next_rows = 0.0

    def say(self, line: str) -> None:
        """Log the line."""
        self._logger.info(line)

    def show(self, snapshot: Snapshot) -> None:
        """Log the state after every tenth of the rows."""
        if snapshot.rows_done >= self._next_rows:
            step = max(1.0, snapshot.rows_total * _LOG_EVERY_ROWS_SHARE)
            self._next_rows = snapshot.rows_done + step
            self._logger.info(plain_line(snapshot))

    def close(self) -> None:
        """Nothing to leave."""


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
    with without_text():
        job = JobSettings.from_flat(whole_settings(settings))
        return run_job(input, output, job, LoggingObserver()).counters


@flow(name="coppice-generate", persist_result=False)
def generate(input: str, output: str, settings: dict[str, Any]) -> dict[str, float]:
    """Generate an answer for every row of `input` into `output`.

    `settings` by flag names, and `config`, the path of a YAML file of more of them: Prefect keeps
    what is passed here, and not what stands there.
    """
    return generate_rows(input, output, settings)
