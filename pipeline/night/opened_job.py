"""The job of one night, opened once for all of its steps. Knows nothing about what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.job.job import Job
from pipeline.night.settings import Night
from pipeline.run import open_to_run


class OpenedJob:
    """Opened by the first step that needs it, and anew where one failed or a file has changed."""

    def __init__(self, night: Night) -> None:
        self.night = night
        self._job: Job | None = None

    @contextmanager
    def passed_on(self) -> Iterator[Job]:
        """The job, for one step. Raises as `open_to_run`."""
        job, self._job = self._job, None
        if job is None or not job.is_current():
            job = open_to_run(self.night.input, self.night.run, self.night.job)
        yield job
        self._job = job  # a step that failed does not come so far
