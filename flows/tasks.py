"""A step of the library as a task of Prefect, whose database has every log line and error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline import errors

_NEVER_RETRIED = (
    errors.UsageError,
    errors.TooManyFailedRows,
    errors.TooManyDegenerate,
    errors.AuditFailed,
    errors.DocumentsDisagree,
    errors.TimeBudgetReached,
    errors.Interrupted,
)
RETRY_DELAYS_S: list[float] = [30.0, 300.0]  # a disk, a device or a network that comes back
Found = TypeVar("Found")


@contextmanager
def without_text() -> Iterator[None]:
    """Let no message out that may quote a prompt, nor the errors that led to one."""
    try:
        yield
    except errors.CoppiceError as error:
        raise error from None
    except Exception as error:
        remedy = "run the same job by coppice --debug run to see the whole traceback"
        raise errors.EngineError(f"{errors.place_of(error)}; {remedy}") from None


async def is_worth_a_retry(tried: Any, run: Any, state: Any) -> bool:
    """A fault of device or disk is; a wrong call, or a stop that was asked for, is not."""
    return not isinstance(await state.aresult(raise_on_failure=False), _NEVER_RETRIED)


def as_task(name: str, step: Callable[[], Found], run_name: str | None = None) -> Found:
    """Do the step, which goes on where it stopped, as a task that is tried again after a while.

    It has no tags: Prefect asks the server for the limit of each tag, and a night must end without
    a server. Flow runs have them.
    """

    @task(
        name=name,
        task_run_name=run_name,
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=is_worth_a_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def call() -> Found:
        with without_text():
            return step()

    return call()
