"""What became of a job, on stdout. Knows nothing about how it was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.streams import result_is_kept, write_result
from pipeline.cli.tables import counter_table, print_json, print_table
from pipeline.errors import TooManyDegenerate, TooManyFailedRows
from pipeline.location import Location

if TYPE_CHECKING:
    from pipeline.job.outcome import RunOutcome


def show_outcome(run: Location, as_json: bool, do: Callable[[], RunOutcome]) -> None:
    """Do a job and show what became of it; as JSON also of one in which too many rows failed, for
    that one is complete as well. Raises what `do` raises."""
    fault: TooManyFailedRows | TooManyDegenerate | None = None
    try:
        outcome = do()
    except (TooManyFailedRows, TooManyDegenerate) as error:
        if not as_json:
            raise
        from pipeline.run import read_outcome

        outcome, fault = read_outcome(run), error
    with result_is_kept(run):
        if as_json:
            print_json(outcome.to_json())
        else:
            print_table(str(run), counter_table(outcome.counters, outcome.reasons, outcome.cost))
    if fault is not None:
        raise fault


def show_done(place: str | Path, as_json: bool, found: Mapping[str, Any], sentence: str) -> None:
    """What was done, as JSON or in a sentence; `place`: where it lies."""
    with result_is_kept(place):
        if as_json:
            print_json(found)
        else:
            write_result(sentence)
