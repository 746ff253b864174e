"""Whom a running job tells about itself. Knows nothing about terminals."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_logger = logging.getLogger("coppice")


@dataclass(frozen=True)
class Pace:
    """How many rows are done after so many seconds; `rows_before`: by an earlier call."""

    rows_total: int
    rows_done: int
    rows_before: int
    elapsed_s: float

    @property
    def eta_s(self) -> float | None:
        """Seconds left at this pace; None before the first row."""
        done = self.rows_done - self.rows_before
        return self.elapsed_s / done * (self.rows_total - self.rows_done) if done > 0 else None


class Planning(Pace):
    """Rows of the input that are read and tokenised."""


@dataclass(frozen=True)
class Snapshot(Pace):
    """Where a session stands. Rows count the whole job, tokens and seconds this session alone.

    `saved_tokens` are prompt tokens of answered rows that were not computed for them;
    `evictions` and `degenerate` are of turns of this session; `scored_requests` are continuations
    of its rows, of `scored_tokens` together.
    """

    rows_failed: int
    prefilled_tokens: int
    saved_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    evictions: int = 0
    degenerate: int = 0
    scored_requests: int = 0
    scored_tokens: int = 0

    def rates(self) -> dict[str, float]:
        """Tokens per second of device time in each phase, and rows per second of wall time."""
        done = self.rows_done - self.rows_before
        return {
            "prefill_tokens_per_s": _rate(self.prefilled_tokens, self.prefill_s),
            "decode_tokens_per_s": _rate(self.generated_tokens, self.decode_s),
            "rows_per_s": _rate(done, self.elapsed_s),
        }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


class Observer:
    """Hears of a job, and shows nothing. Calls may come from any thread, one at a time."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def note(self, line: str, is_warning: bool = False) -> None:
        """One that holds for the run, and not only now; a warning: of what one may miss."""
        self.say(line)

    def show_planning(self, planning: Planning) -> None:
        """How far the plan is; called with every batch of rows."""

    def show(self, snapshot: Snapshot) -> None:
        """A new state; called about twice a second."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


class SilentObserver(Observer):
    """For who wants to see nothing: what holds for the run is in Python's log all the same."""

    def note(self, line: str, is_warning: bool = False) -> None:
        _logger.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
        self.say(line)
