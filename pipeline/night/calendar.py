"""Which nights are due. Knows nothing about what is done in one.

Whoever does nights says first that tonight is due (`mark_due`), by an empty run directory, or below
`s3://` by an object OUTPUT/NAME/due/DATE: so a night that never began, for older ones took all of
the time or the process died, is caught up as well.
"""

from __future__ import annotations

import datetime
from contextlib import suppress

from pipeline.night.settings import Night
from pipeline.night.state import read_state
from pipeline.storage.durable import make_folder, write_errors
from pipeline.storage.remote_folder import RemoteFolder, SupersededError


def unfinished_before(night: Night) -> list[Night]:
    """Older nights of this job within `catch_up` that are due and not done, oldest first.

    One that waits for a person (its audit failed, or too many rows) is not among them.
    """
    days = range(night.settings.catch_up, 0, -1)
    dates = [night.date - datetime.timedelta(days=ago) for ago in days]
    older = [Night.on(date, night.settings, night.job) for date in dates]
    if night.run.is_remote:
        due = _home(night).names("due/")
        older = [night for night in older if _due_name(night) in due]
    else:
        older = [night for night in older if night.run.local.is_dir()]
    return [night for night in older if read_state(night).is_unfinished]


def mark_due(night: Night) -> None:
    """Say that this night is to be done. Raises StorageError."""
    if night.run.is_remote:
        with suppress(SupersededError):
            _home(night).put_if(_due_name(night), b"due\n", None)
        return
    with write_errors(night.run.local):
        make_folder(night.run.local)


def forget_due(night: Night) -> None:
    """Nothing of this night is to be done any more; one that began stays."""
    if night.run.is_remote:
        _home(night).delete([_due_name(night)])
        return
    with suppress(OSError):
        night.run.local.rmdir()


def _home(night: Night) -> RemoteFolder:
    return RemoteFolder(night.home)


def _due_name(night: Night) -> str:
    return f"due/{night.date.isoformat()}"
