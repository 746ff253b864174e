"""A step of the library as a task of Prefect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.privacy import without_text
from pipeline.errors import (
    AuditFailed,
    Interrupted,
    TimeBudgetReached,
    TooManyFailedRows,
    UsageError,
)

_NEVER_RETRIED = (UsageError, TooManyFailedRows, AuditFailed, TimeBudgetReached, Interrupted)
Found = TypeVar("Found")


async def is_worth_a_retry(tried: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """A fault of device or disk is; a wrong call, or a stop that was asked for, is not."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, _NEVER_RETRIED)


def as_task(name: str, step: Callable[[], Found], run_name: str | None = None) -> Found:
    """Do the step, which goes on where it stopped, as a task with one retry."""

    @task(
        name=name,
        task_run_name=run_name,
        retries=1,
        retry_condition_fn=is_worth_a_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def call() -> Found:
        with without_text():
            return step()

    return call()
