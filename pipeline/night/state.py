"""How far a night is, from what is on the disk. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.audit.gate import current_verdict
from pipeline.night.publication import edition_of, open_target
from pipeline.night.settings import Night
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import holds_run, reading_run

Stage = Literal[
    "waiting", "begun", "too many failed", "generated", "audit failed", "audited", "done"
]
"""`generated`: not audited yet, or in another state; `audited`: passed, but not published."""


@dataclass(frozen=True)
class NightState:
    """`rows` and `rows_failed` are counted when the run is complete; `published`: where."""

    stage: Stage
    rows: int = 0
    rows_failed: int = 0
    published: str | None = None

    @property
    def is_unfinished(self) -> bool:
        """Whether the same command can bring it further; else it is done or waits for a person."""
        return self.stage not in ("done", "too many failed", "audit failed")


def read_state(night: Night) -> NightState:
    """Raises RunDirectoryError for a directory of something else, StorageError."""
    if not holds_run(night.run):
        return NightState("waiting")
    with reading_run(night.run, parts=False) as directory:
        return _describe(night, directory)


def _describe(night: Night, directory: RunDirectory) -> NightState:
    if not directory.is_sealed:
        return NightState("begun")
    answered, failed = directory.count_rows()
    rows = answered + failed
    verdict = current_verdict(directory, night.job.audit)
    published = _where_published(night, directory)
    if verdict == "laxer" and published is not None:
        verdict = "pass"  # by the bar of its day, or a person's; what is published stays
    if failed > night.job.write.allowed_failures(rows):
        return NightState("too many failed", rows, failed)
    if verdict != "pass":
        stage: Stage = "audit failed" if verdict == "fail" else "generated"
        return NightState(stage, rows, failed)
    is_done = published is not None or night.settings.publish is None
    return NightState("done" if is_done else "audited", rows, failed, published)


def _where_published(night: Night, directory: RunDirectory) -> str | None:
    """Path or URL, if what is there is what the directory holds."""
    if night.target is None:
        return None
    target = open_target(night.target)
    held = target.read(night.date.isoformat())
    is_there = held is not None and held.get("edition") == edition_of(directory)
    return target.location(night.date.isoformat()) if is_there else None
