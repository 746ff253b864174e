"""One device, one job at a time: a lock per device of this machine, shared by all its users.

Two jobs on one device are both slower than one after the other, and each counts the memory that
the other is about to take as free. The lock dies with the process that holds it.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.job.observer import Observer
from pipeline.settings import JobSettings
from pipeline.storage.lock import FileLock, HeldElsewhere

_LOOK_EVERY_S = 0.5
_FOLDER = "COPPICE_LOCKS"  # containers that share a device can share this folder


@contextmanager
def holding_device(
    settings: JobSettings,
    observer: Observer,
    check: Callable[[], None] = lambda: None,
    given_up: threading.Event | None = None,
) -> Iterator[None]:
    """Hold the job's device meanwhile; wait for whoever has it, as `busy_device` says.

    `check` is called twice a second while waiting, and raises what ends the wait; so does the
    event. Raises UsageError if the device is busy and must not be waited for, or if the folder of
    the locks cannot be written; ModelError for a device that is not there.
    """
    if settings.model.engine == "echo" or settings.engine.busy_device == "share":
        yield
        return
    lock = _wait(settings, observer, check, given_up or threading.Event())
    try:
        yield
    finally:
        lock.release()


def _wait(
    settings: JobSettings, observer: Observer, check: Callable[[], None], given_up: threading.Event
) -> FileLock:
    from pipeline.model.device import name_device

    device = name_device(settings.model.device)
    has_said = False
    while True:
        try:
            return _take(device)
        except HeldElsewhere as held:
            busy = f"the device {device} is in use by {held.owner}"
        if settings.engine.busy_device == "fail":
            raise UsageError(f"{busy}; wait until it ends, or say --busy-device wait or share")
        if not has_said:
            observer.say(f"{busy}; waiting for it (--busy-device share would run beside it)")
            has_said = True
        check()
        if given_up.wait(_LOOK_EVERY_S):
            raise UsageError(f"{busy}, and the job that waited for it has ended")


def _take(device: str) -> FileLock:
    named = os.environ.get(_FOLDER)
    folder = Path(named or Path(tempfile.gettempdir()) / "coppice-locks")
    path = folder / f"{re.sub(r'[^A-Za-z0-9-]+', '-', device)}.lock"
    try:
        _make_shared(folder)
        if folder.is_symlink() and not named:  # where everybody may write, anybody's
            raise OSError(errno.ELOOP, f"{folder} is a link")
        return FileLock(path, 0o666)
    except OSError as error:
        raise UsageError(
            f"cannot lock the device in {path} ({error.strerror}); set {_FOLDER} to a folder that "
            "all its users may write to, or say --busy-device share"
        ) from error


def _make_shared(folder: Path) -> None:
    """Other users' jobs wait for this one as well. Raises OSError."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # by another job that starts just now
            folder.mkdir()
            folder.chmod(0o1777)
