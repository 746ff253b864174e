"""Nights as a flow: what the library does, with a task for each step of each night.

```
 validate ─► plan ─► generate ─► audit ─► report ─► publish
```
Nights that would overlap are kept apart by the library's lock, not by a concurrency limit of
Prefect: its engine ends a running night if the server, restarted, has forgotten the slot's lease.
"""

import datetime
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run

from flows.artifacts import PrefectObserver
from flows.credentials import find_credentials
from flows.tasks import as_task, without_text
from pipeline.errors import CoppiceError, FolderInUse, Interrupted, TimeBudgetReached
from pipeline.night.dates import logical_date, parse_date
from pipeline.night.ending import Ending, worst
from pipeline.night.night import run_nights
from pipeline.night.settings import Night, read_night
from pipeline.night.steps import Step

# Neither done nor failed, for the next sitting goes on: what waits for completed nights must not
# start, and nobody has to get up.
_STOPS = {
    TimeBudgetReached: "StoppedByTimeBudget",
    Interrupted: "Interrupted",
    FolderInUse: "EarlierNightStillRunning",
}


def _day(timezone: str = "UTC", date: object = None, **_: Any) -> datetime.date:
    """`date`, or that of the scheduled start, which a late run keeps. Raises UsageError."""
    return parse_date(str(date)) if date else logical_date(flow_run.scheduled_start_time, timezone)


def _run_name() -> str:
    """`reviews 2026-11-22`. Never fails: Prefect asks before the flow can say what is wrong."""
    path = Path(flow_run.parameters["file"])
    with suppress(CoppiceError):
        night = read_night(path, _day(**flow_run.parameters))
        return f"{night.settings.name} {night.date}"
    return path.stem


@flow(name="coppice-nightly", flow_run_name=_run_name, persist_result=False)
def nightly(
    file: str,
    timezone: str = "UTC",
    date: datetime.date | None = None,
    credentials: str | None = None,
) -> State[Any]:
    """Do the unfinished nights of the YAML `file`, then that of the run's scheduled date.

    `credentials`: a block of S3 credentials of this name.
    """
    with PrefectObserver() as observer:

        def call(name: str, night: Night, step: Step) -> dict[str, Any]:
            try:
                found = as_task(name, step, f"{name} {night.date}")
            finally:
                if name == "generate":
                    observer.show_parts(night)
            if name == "report":
                observer.show_report(f"Report of {night.date}", night.run, **found)
            return found

        try:
            with without_text():
                day, store = _day(timezone, date), find_credentials(credentials)
                endings = run_nights(Path(file), day, observer, call, store)
        except CoppiceError as error:
            return final_state([], error)
        return final_state(endings, worst(endings))


def final_state(endings: list[Ending], error: CoppiceError | None) -> State[Any]:
    """Completed, stopped or failed by `error`, with the sentences of all nights."""
    kind, name = StateType.FAILED, "Failed"
    if error is None:
        kind, name = StateType.COMPLETED, endings[-1].state.title().replace("_", "")
    elif type(error) in _STOPS:
        kind, name = StateType.CANCELLED, _STOPS[type(error)]
    said = [ending.sentence() for ending in endings] or [f"{error}."]
    return State(type=kind, name=name, message=" ".join(said), data=error)
