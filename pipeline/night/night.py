"""One night from its input to its publication, and a sitting: unfinished nights, then tonight's."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import (
    AuditFailed,
    CoppiceError,
    DocumentsDisagree,
    FolderInUse,
    Interrupted,
    NoInput,
    TimeBudgetReached,
    TooManyDegenerate,
    TooManyFailedRows,
)
from pipeline.job.observer import Observer
from pipeline.model.machine import cache_folder
from pipeline.night.calendar import forget_due, mark_due, unfinished_before
from pipeline.night.ending import Ending, NightFailure, NightOutcome
from pipeline.night.opened_job import OpenedJob
from pipeline.night.settings import Night, read_night
from pipeline.night.state import NightState, read_state
from pipeline.night.steps import (
    Call,
    audit_night,
    check_input,
    directly,
    generate_night,
    plan_night,
    publish_night,
    report_night,
)
from pipeline.storage.durable import make_folder, write_errors
from pipeline.storage.lock import FolderLock
from pipeline.store_settings import ObjectStoreSettings


def run_nights(
    path: Path,
    day: datetime.date,
    observer: Observer,
    call: Call = directly,
    store: ObjectStoreSettings | None = None,
) -> list[Ending]:
    """Do the unfinished nights of the file, oldest first, then that of `day`.

    A night that fails does not keep the next one from its turn; a spent time budget, a signal and
    another process at work do. `store`: how object stores are reached, over what the file says.

    Raises UsageError for the file, FolderInUse while another one sits.
    """
    started = time.monotonic()  # the clock on the wall may be set while nights run
    tonight = read_night(path, day)
    if store is not None:
        tonight = tonight.reached_by(store)
    mark_due(tonight)
    budget = tonight.job.write.time_budget
    endings: list[Ending] = []
    with sitting(tonight):
        nights = [*unfinished_before(tonight), tonight]
        for night in nights:
            left = None if budget is None else budget - (time.monotonic() - started)
            if len(nights) > 1:
                observer.say(f"the night of {night.date}")
            try:
                endings.append(run_night(night, observer, left, call))
            except CoppiceError as error:
                endings.append(NightFailure(night.date, error))
                if isinstance(error, Interrupted | TimeBudgetReached | FolderInUse):
                    break
    return endings


def run_night(
    night: Night, observer: Observer, time_budget_s: float | None, call: Call = directly
) -> NightOutcome:
    """Do what is left of one night. Raises whatever a step raises.

    A failed audit and too many failed rows still get their report, and publish nothing.
    """
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    opened, state = OpenedJob(night), read_state(night)
    if state.stage == "done":
        observer.say(f"the night of {night.date} is done; nothing to do")
        return _outcome(night, state, f"{night.run}/report.html")
    if state.stage != "audited":  # else only its publication failed, which needs no input
        try:
            call("validate", night, lambda: check_input(opened))
        except NoInput:
            if state.stage != "waiting":
                raise
            forget_due(night)
            if night.settings.on_no_input == "fail":
                raise
            return NightOutcome("skipped", night.date)
        _generate_and_audit(opened, observer, deadline, call)
    page = call("report", night, lambda: report_night(night))["page"]
    call("publish", night, lambda: publish_night(night))
    return _outcome(night, read_state(night), page)


def _generate_and_audit(
    opened: OpenedJob, observer: Observer, deadline: float | None, call: Call
) -> None:
    night = opened.night

    def generate() -> dict[str, Any]:
        # Asked at every try: one that is repeated after hours has not the whole time again.
        left = None if deadline is None else deadline - time.monotonic()
        return generate_night(opened, observer, left)

    call("plan", night, lambda: plan_night(opened, observer))
    try:
        call("generate", night, generate)
        call("audit", night, lambda: audit_night(opened, observer))
    except (TooManyFailedRows, TooManyDegenerate, AuditFailed, DocumentsDisagree):
        call("report", night, lambda: report_night(night))
        raise


@contextmanager
def sitting(night: Night) -> Iterator[None]:
    """One process at a time does the nights of a job. Raises FolderInUse, StorageError."""
    folder = night.home.local
    if night.home.is_remote:
        digest = hashlib.sha256(str(night.home).encode()).hexdigest()[:24]
        folder = cache_folder() / "nights" / digest
    with write_errors(folder):
        make_folder(folder)
    try:
        lock = FolderLock(folder)
    except FolderInUse as busy:
        raise FolderInUse(
            f"an earlier night of {night.settings.name} is still going ({busy.owner}); that of "
            f"{night.date} is done after it, by the next sitting or by the same command",
            busy.owner,
        ) from busy
    try:
        yield
    finally:
        lock.release()


def _outcome(night: Night, state: NightState, page: str) -> NightOutcome:
    return NightOutcome(
        state="completed_with_errors" if state.rows_failed else "completed",
        date=night.date,
        rows=state.rows,
        rows_failed=state.rows_failed,
        rows_allowed=night.job.write.allowed_failures(state.rows),
        verdict="pass",
        published=state.published,
        page=page,
    )
