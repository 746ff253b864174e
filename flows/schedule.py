"""Serves the nights of a file by cron: the server says when, this process runs them here.

A night is a process of its own. It goes on while the server is away.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.schedules import Cron, Schedule
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.types.entrypoint import EntrypointType

from flows.nightly import nightly
from pipeline.errors import UsageError
from pipeline.night.dates import open_zone
from pipeline.night.settings import read_night

_TIMEOUT_S = 5.0
# One works; another may start, and ends at once because the first has the lock of the nights.
# Kept from starting it would only be late, and start in the middle of the next day.
_PROCESSES = 2


def serve(path: Path, cron: str, timezone: str, name: str | None = None) -> None:
    """Serve the nights of `path` until a signal, as the deployment `name` (the night's own name).

    Raises UsageError for a wrong file, cron or zone, and if no Prefect server answers: Prefect
    itself would start a server without a scheduler, and wait for ever.
    """
    schedule = make_schedule(cron, timezone)
    day = datetime.datetime.now(open_zone(timezone)).date()
    name = name or read_night(path, day).settings.name
    check_server()
    nightly.serve(
        name=name,
        schedule=schedule,
        parameters={"file": str(path.absolute()), "timezone": timezone},
        limit=_PROCESSES,
        pause_on_shutdown=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def make_schedule(cron: str, timezone: str) -> Schedule:
    """Raises UsageError."""
    open_zone(timezone)
    try:
        return Cron(cron, timezone=timezone)
    except ValueError:
        raise UsageError(f"{cron!r} is not a cron schedule; write it like '0 2 * * *'") from None


def check_server() -> None:
    """Raises UsageError within seconds unless a Prefect server answers."""
    url = PREFECT_API_URL.value()
    remedy = (
        "start one in another terminal by 'prefect server start', and name it by "
        "'export PREFECT_API_URL=http://127.0.0.1:4200/api' (or 'prefect config set' instead of "
        "'export'); 'coppice night' and cron need none"
    )
    if not url:
        raise UsageError(f"no Prefect server is named; {remedy}")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        with get_client(sync_client=True, httpx_settings={"timeout": _TIMEOUT_S}) as client:
            try:
                client.api_version()
            except Exception as error:  # connection, status, or a page that is no Prefect's
                raise UsageError(
                    f"no Prefect server answers at {url} ({type(error).__name__}); {remedy}"
                ) from None
