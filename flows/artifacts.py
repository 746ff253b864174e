"""What a person sees of a running job in Prefect: counts, rates and places, never text of a row.

A server that is slow, locked or dead costs a job nothing but these artifacts.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote
from uuid import UUID

import prefect.artifacts as prefect
from prefect.logging import get_run_logger

from flows.messenger import Messenger
from flows.part_table import part_table
from pipeline.cli.progress import plain_line, planning_line
from pipeline.job.observer import Observer, Planning, Snapshot
from pipeline.location import Location
from pipeline.night.settings import Night
from pipeline.storage.object_store import ObjectUrl
from pipeline.visible import visible

_LOG_EVERY_ROWS_SHARE = 0.1
_EVERY_S = 10.0
_PATIENCE_S = 10.0
_DEAF = "Prefect's server takes no artifacts (%s); the job goes on without them"


class PrefectObserver(Observer):
    """Tells Prefect's log and its artifacts what a terminal would see."""

    def __init__(self) -> None:
        self._logger = logger = get_run_logger()
        self._next_rows = 0.0
        self._next_planned = 0.0
        self._next_s = 0.0
        self._progress: UUID | None = None
        self._artifacts = Messenger(lambda error: logger.warning(_DEAF, type(error).__name__))

    def say(self, line: str) -> None:
        self._logger.info(visible(line))

    def show_planning(self, planning: Planning) -> None:
        """Log the state after every tenth of the rows."""
        if planning.rows_done >= self._next_planned:
            self._next_planned = planning.rows_done + planning.rows_total * _LOG_EVERY_ROWS_SHARE
            self._logger.info(planning_line(planning))

    def show(self, snapshot: Snapshot) -> None:
        """Log the state after every tenth of the rows, and show it every ten seconds."""
        if snapshot.rows_done >= self._next_rows:
            step = max(1.0, snapshot.rows_total * _LOG_EVERY_ROWS_SHARE)
            self._next_rows = snapshot.rows_done + step
            self._logger.info(plain_line(snapshot))
        is_last = snapshot.rows_done == snapshot.rows_total
        if is_last or (time.monotonic() >= self._next_s and self._artifacts.is_free):
            self._next_s = time.monotonic() + _EVERY_S
            self._artifacts.send(lambda: self._show_progress(snapshot))

    def show_parts(self, night: Night) -> None:
        """One row a part."""
        said = f"Parts of {night.date}"
        self._artifacts.send(
            lambda: prefect.create_table_artifact(part_table(night), "night-parts", said)
        )

    def show_report(self, said: str, run: Location, page: str, summary: str) -> None:
        """The summary of the report, where its page is, and a link where a browser can open one."""
        link = _address(run, page)
        where = f"`{page}`" if run.is_remote else f"`{Path(page).absolute()}` on {platform.node()}"
        text = f"{summary.rstrip()}\n\nThe whole report: {where}\n"
        self._artifacts.send(lambda: prefect.create_markdown_artifact(text, "night-summary", said))
        if link is not None:
            self._artifacts.send(lambda: prefect.create_link_artifact(link, said, "night-report"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait a moment for what was not told yet."""
        self._artifacts.finish(_PATIENCE_S)

    def _show_progress(self, snapshot: Snapshot) -> None:
        share, said = 100.0 * snapshot.rows_done / max(1, snapshot.rows_total), plain_line(snapshot)
        if self._progress is None:
            made = prefect.create_progress_artifact(share, "night-progress", said)
            self._progress = cast(UUID, made)  # typed as what it is in a coroutine as well
        else:
            prefect.update_progress_artifact(self._progress, share, said)


_CONSOLES = {
    "s3": "https://console.aws.amazon.com/s3/object/{bucket}?prefix={key}",
    "gs": "https://console.cloud.google.com/storage/browser/_details/{bucket}/{key}",
}


def _address(run: Location, page: str) -> str | None:
    """Where a browser finds the page; None for a file, which it does not open from a site, and for
    Azure's, whose console goes by numbers of its own."""
    if not run.is_remote:
        return None
    url = ObjectUrl.parse(page)
    if run.endpoint is not None:
        return f"{run.endpoint.rstrip('/')}/{url.bucket}/{quote(url.key)}"
    console = _CONSOLES.get(url.scheme)
    return console and console.format(bucket=url.bucket, key=quote(url.key))
