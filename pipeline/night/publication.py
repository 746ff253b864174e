"""The gate: a sealed run whose audit passed becomes a publication. Knows no files' mechanics.

A published night never changes, with one exception: a later state of the same run directory (rows
that were lost or failed, and were answered since) takes the place of the earlier one, whole.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.audit.gate import WHY_NOT, current_verdict
from pipeline.errors import AuditFailed, RunDirectoryError, UsageError
from pipeline.location import Location
from pipeline.night.dates import parse_date
from pipeline.night.folder_target import FolderTarget
from pipeline.night.published import Content
from pipeline.night.settings import check_apart
from pipeline.night.store_target import StoreTarget
from pipeline.report.page import render
from pipeline.settings import AuditSettings
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import find_manifest, reading_run
from pipeline.storage.summaries import PLAN_SUMMARY

_PAGES = ("report.html", "report.md")


class Target(Protocol):
    """Where publications are, each below its date. Every method raises StorageError."""

    def location(self, date: str) -> str:
        """Path or URL of a publication."""

    def read(self, date: str) -> dict[str, Any] | None:
        """`published.json` of a publication; None if there is none."""

    def check(self, date: str) -> None:
        """Raises RunDirectoryError, too, where no publication of the date could be put."""

    def publish(self, date: str, content: Content) -> None:
        """Put the content there, whole or not at all, in place of what `content.replaces`.

        Raises RunDirectoryError if something else is there or somebody else is publishing.
        """


@dataclass(frozen=True)
class Published:
    """`is_new`: False if it was published before."""

    location: str
    parts: int
    rows: int
    is_new: bool


def open_target(target: Location) -> Target:
    """Raises UsageError for a URL that is none of a bucket."""
    return StoreTarget(target) if target.is_remote else FolderTarget(target.local)


def edition_of(directory: RunDirectory) -> str:
    """Names what the directory holds now: the run, and a hash over its parts."""
    digest = hashlib.sha256("\n".join(directory.part_names()).encode()).hexdigest()
    return f"{directory.run_id}-{digest[:12]}"


def check_target(run: Location, target: Location, date: datetime.date) -> None:
    """Refuse, before anything is computed, a target where `publish_run` could not put the run.

    Raises UsageError for a library that is missing, RunDirectoryError, StorageError.
    """
    opened, day = open_target(target), date.isoformat()
    opened.check(day)
    held, manifest = opened.read(day), find_manifest(run)
    if held is not None and (manifest is None or manifest["run_id"] != held.get("run_id")):
        raise _of_another_run(opened.location(day), held, str(run))


def publish_run(
    run: Location, target: Location, job: str, date: datetime.date, bar: AuditSettings | None = None
) -> Published:
    """Publish a run as `target`/`date`, or find that it is published. `bar`: see `check_gate`.

    Raises AuditFailed; RunDirectoryError for a run that is not complete or not audited as it is
    now, or where the date holds another one; StorageError, with nothing published.
    """
    opened, day = open_target(target), date.isoformat()
    with reading_run(run) as directory:
        check_gate(directory, bar)
        held, num_rows = opened.read(day), sum(directory.count_rows())
        published = Published(opened.location(day), len(directory.part_names()), num_rows, True)
        if held is not None and held.get("edition") == edition_of(directory):
            return replace(published, is_new=False)
        described = _describe(directory, job, day)
        if held is not None and not _is_earlier(held, described):
            raise _of_another_run(published.location, held, directory.name)
        render(directory)
        files = {name: directory.root / name for name in _PAGES}
        files |= {f"data/{name}": directory.data / name for name in directory.part_names()}
        opened.publish(day, Content(described, files, replaces=held))
    return published


def _of_another_run(location: str, held: dict[str, Any], run: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{location} holds another run ({held.get('run_id')} of {held.get('job')}); move it away "
        f"to publish {run}"
    )


def check_gate(directory: RunDirectory, bar: AuditSettings | None = None) -> None:
    """Raises RunDirectoryError unless sealed, whole, and audited as it is now; AuditFailed.

    `bar`: what the audit must have been asked to show at least; None: whatever a person asked.
    StorageError where a row is missing, or a part was altered or is there twice.
    """
    directory.check_complete()
    verdict = current_verdict(directory, bar)
    if verdict == "fail":
        raise AuditFailed(f"the audit of {directory.name} failed, so it is not published")
    if verdict != "pass":
        raise RunDirectoryError(
            f"{directory.name} {WHY_NOT[verdict]}; run: coppice audit {directory.name}"
        )


def publish_by_hand(
    run: Location, target: Location, date: str | None, job: str | None
) -> Published:
    """As `publish_run`; what is not said is taken from a path like NAME/2026-11-22.

    Raises UsageError where it cannot be.
    """
    above, _, own = run.absolute.rstrip("/").rpartition("/")
    if date is None and not re.fullmatch(r"\d{4}-\d\d-\d\d", own):
        raise UsageError(f"{run} does not end in a date; say which day it is by --date 2026-11-22")
    try:
        check_apart(run, target)
    except ValueError as error:
        raise UsageError(f"{error}; choose another folder") from None
    of_night = date is None or date == own
    chosen = job or (above.rpartition("/")[2] if of_night else own)
    return publish_run(run, target, chosen, parse_date(date or own))


def _describe(directory: RunDirectory, job: str, date: str) -> dict[str, Any]:
    manifest = directory.read_manifest()
    answered, failed = directory.count_rows()  # counters are believed by nobody
    return {
        "job": job,
        "date": date,
        "run_id": manifest["run_id"],
        "edition": edition_of(directory),
        "run_created_at": manifest["created_at"],
        "sessions": len(manifest["sessions"]),
        "plan_hash": _plan_hash(directory),
        "rows": answered + failed,
        "rows_failed": failed,
        "audit": "pass",
    }


def _plan_hash(directory: RunDirectory) -> str:
    summary = PLAN_SUMMARY.read(directory.root)
    if summary is None:
        raise RunDirectoryError(
            f"{directory.name}/{PLAN_SUMMARY.name} is gone; run the same job again, which makes "
            "it anew"
        )
    return str(summary["plan_hash"])


def _is_earlier(held: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether `held` was published from the same run directory, before its last sessions."""
    same = ("job", "run_id", "run_created_at")
    is_ours = all(held.get(name) == now[name] for name in same)
    return is_ours and held.get("sessions", 0) < now["sessions"]
