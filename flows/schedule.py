"""Serves the nights of a file by cron: the server says when, this process runs them here.

A night is a process of its own. It goes on while the server is away.
"""

from __future__ import annotations

import asyncio
import datetime
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.runner import Runner
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.types.entrypoint import EntrypointType

from flows.nightly import nightly
from pipeline.errors import UsageError
from pipeline.night.dates import open_zone
from pipeline.night.settings import read_night

_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 10.0
# One works; another may start, and ends at once because the first has the lock of the nights.
# Kept from starting it would only be late, and start in the middle of the next day.
_PROCESSES = 2
_REMEDY = (
    "start one in another terminal by 'prefect server start', and name it by "
    "'export PREFECT_API_URL=http://127.0.0.1:4200/api'; 'coppice night' and cron need none"
)


class NightRunner(Runner):
    """A runner that ends by SIGTERM as by Ctrl-C on a terminal: after its nights, which drain.

    Prefect's own leaves from the middle of its event loop, and kills what needs longer than 30 s.
    """

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        """Pass the signal on: a second one lets the nights abort."""
        for night in multiprocessing.active_children():
            night.terminate()
        os.kill(os.getpid(), signal.SIGINT)


def serve(path: Path, cron: str, timezone: str, name: str | None = None) -> None:
    """Serve the nights of `path` until a signal, as the deployment `name` (the night's own name).

    Raises UsageError for a wrong file, cron or zone, and if no Prefect server answers: Prefect
    itself would start a server without a scheduler, and wait for ever.
    """
    day = datetime.datetime.now(open_zone(timezone)).date()
    deployment: dict[str, Any] = {
        "name": name or read_night(path, day).settings.name,
        "tags": ["coppice", "nightly"],
        "parameters": {"file": str(path.absolute()), "timezone": timezone},
    }
    try:
        deployment["schedule"] = Cron(cron, timezone=timezone)
    except ValueError:
        raise UsageError(f"{cron!r} is not a cron schedule; write it like '0 2 * * *'") from None
    check_server()
    # A shell lets what it starts in the background ignore the signal that `handle_sigterm` sends.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        while not _serve_until_signal(deployment):
            _wait_for_server()


def _serve_until_signal(deployment: dict[str, Any]) -> bool:
    """False if it ended because the server had not answered for minutes."""
    try:
        runner = NightRunner(deployment["name"], limit=_PROCESSES, pause_on_shutdown=False)
        runner.add_flow(nightly, entrypoint_type=EntrypointType.MODULE_PATH, **deployment)
        print(f"serving coppice-nightly/{deployment['name']}", flush=True)
        asyncio.run(runner.start())
        return True
    except* (RuntimeError, httpx.TransportError):
        pass
    return False


def _wait_for_server() -> None:
    print("coppice: the Prefect server is away; waiting for it", flush=True)
    while True:
        time.sleep(_LOOK_EVERY_S)
        with suppress(UsageError):
            return check_server()


def check_server() -> None:
    """Raises UsageError within seconds unless a Prefect server answers."""
    url = PREFECT_API_URL.value()
    if not url:
        raise UsageError(f"no Prefect server is named; {_REMEDY}")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        with get_client(sync_client=True, httpx_settings={"timeout": _TIMEOUT_S}) as client:
            try:
                client.api_version()
            except Exception as error:  # connection, status, or a page that is no Prefect's
                why = type(error).__name__
                raise UsageError(f"no Prefect server answers at {url} ({why}); {_REMEDY}") from None
