"""What became of a night, in a record and in a sentence. Knows nothing about how."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import CoppiceError, Interrupted, TimeBudgetReached


@dataclass(frozen=True)
class NightOutcome:
    """A night that ended well enough. `rows_allowed`: as many may fail.

    `published`, `page`: path or URL, None where there is none.
    """

    state: Literal["completed", "completed_with_errors", "skipped"]
    date: datetime.date
    rows: int = 0
    rows_failed: int = 0
    rows_allowed: int = 0
    verdict: str | None = None
    published: str | None = None
    page: str | None = None

    def sentence(self) -> str:
        """For a log and as a flow's final state; begins with the state, has no text of a row."""
        if self.state == "skipped":
            return f"Skipped: there is no input for {self.date}."
        said = f"Completed: {self.rows:,} rows of {self.date}"
        if self.rows_failed:
            said = (
                f"Completed with errors: {self.rows_failed:,} of {self.rows:,} rows of "
                f"{self.date} failed ({self.rows_allowed:,} allowed)"
            )
        where = f"published at {self.published}" if self.published else "not published"
        return f"{said}, audit {self.verdict or 'missing'}, {where}."

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        return asdict(self) | {"date": str(self.date)}


@dataclass(frozen=True)
class NightFailure:
    """A night that was stopped or failed; `error` says why."""

    date: datetime.date
    error: CoppiceError

    @property
    def state(self) -> Literal["stopped", "failed"]:
        """`stopped`: the same command goes on."""
        is_stop = isinstance(self.error, TimeBudgetReached | Interrupted)
        return "stopped" if is_stop else "failed"

    def sentence(self) -> str:
        """As of an outcome."""
        return f"{self.state.capitalize()}: {self.date}: {self.error}."

    def to_json(self) -> dict[str, Any]:
        """As of an outcome."""
        code = self.error.exit_code
        return {
            "state": self.state, "date": str(self.date), "error": str(self.error), "exit_code": code
        }  # fmt: skip


Ending = NightOutcome | NightFailure


def worst(endings: list[Ending]) -> CoppiceError | None:
    """What the sitting as a whole comes to: an interruption, else the first failure, else a stop.

    A stop is the least: a failed audit must not hide behind a spent time budget.
    """
    errors = [ending.error for ending in endings if isinstance(ending, NightFailure)]
    errors.sort(key=lambda e: (not isinstance(e, Interrupted), isinstance(e, TimeBudgetReached)))
    return errors[0] if errors else None
