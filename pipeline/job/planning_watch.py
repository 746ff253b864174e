"""Who is told how far a plan is: the observer, `status` of this user, and whoever may end it.

A job makes its output folder only when input and model have proved sound. So what `status` can say
before that lies in the user's cache, in a file for each folder, which counts while its owner lives.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.job.observer import Observer, Planning
from pipeline.location import Location
from pipeline.model.machine import cache_folder
from pipeline.private_folder import private_folder
from pipeline.storage.durable import replace_file
from pipeline.storage.lock import is_dead, own_name

_NOTE_EVERY_S = 1.0


class PlanningWatch:
    """Called with every batch of rows that is planned."""

    def __init__(self, observer: Observer, run: Location) -> None:
        self.observer = observer
        self._run, self._path = run, _note_path(run)
        self._noted_at = -_NOTE_EVERY_S

    def __call__(self, planning: Planning) -> None:
        """Tell it."""
        self.observer.show_planning(planning)
        if time.monotonic() - self._noted_at >= _NOTE_EVERY_S:
            self._noted_at = time.monotonic()
            self._note(planning)

    def until_failure(self, loading: Future[Any]) -> Callable[[Planning], None]:
        """The same; a model that could not be loaded meanwhile ends the planning at once."""

        def tell(planning: Planning) -> None:
            if loading.done():
                loading.result()
            self(planning)

        return tell

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Meanwhile `status` says that the job is being planned."""
        self._note(Planning(0, 0, 0, 0.0))
        try:
            yield
        finally:
            self.finish()

    def finish(self) -> None:
        """The run itself has more to say now."""
        note = read_note(self._run)
        if note is not None and note["owner"] == own_name():  # else another job's, for this folder
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _note(self, planning: Planning) -> None:
        """No plan fails because a cache cannot be written."""
        note = asdict(planning) | {"owner": own_name(), "eta_s": planning.eta_s}
        with suppress(StorageError, OSError):
            private_folder(self._path.parent)
            replace_file(self._path, json.dumps(note).encode())


def read_note(run: Location) -> dict[str, Any] | None:
    """What a living job of this user says of its plan for `run`; None: there is none."""
    try:
        note: dict[str, Any] = json.loads(_note_path(run).read_bytes())
        return None if is_dead(note["owner"]) else note
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_path(run: Location) -> Path:
    digest = hashlib.sha256(os.fsencode(run.canonical)).hexdigest()[:24]
    return cache_folder() / "planning" / f"{digest}.json"
