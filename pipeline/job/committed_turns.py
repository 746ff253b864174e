"""Turns of conversations that are answered in part: what an earlier session has committed of them.

```
 turns of a conversation    0 done   1 done   2 left   3 done   4 left
                            `earlier`, given    runs    runs; must come out as committed
```

Parts are written as answers come, so what is done is a beginning, unless a part was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.plan.conversations import ConversationPlan
from pipeline.plan.plan import Plan
from pipeline.records import EarlierTurn, EvictionEvent
from pipeline.storage.run_directory import RunDirectory

_COLUMNS = ("row_index", "status", "completion_token_ids", "eviction_log")


class CommittedTurns:
    """Those of the conversations of a plan that have turns left. `done`: [rows] bool."""

    def __init__(self, plan: Plan, directory: RunDirectory, done: NDArray[np.bool_]) -> None:
        turns = plan.conversations
        assert turns is not None
        self._turns: ConversationPlan = turns
        self._done = done
        is_done = done[turns.row]
        left = np.add.reduceat(~is_done, turns.bounds[:-1]) if len(turns.row) else is_done
        sequence = np.repeat(np.arange(len(plan.sequences)), np.diff(turns.bounds))
        self._rows = turns.row[is_done & (left[sequence] > 0)]
        self._frame = _read(directory, self._rows)
        self._place = {row: place for place, row in enumerate(self._frame["row_index"].to_list())}

    def earlier(self, sequence: int) -> tuple[EarlierTurn, ...]:
        """The turns from the first on up to the first that is not done."""
        return tuple(map(self._turn, self._beginning(sequence)))

    def answer(self, row: int) -> tuple[int, ...] | None:
        """The ids that are committed for a row; None: it is none of these turns, or failed."""
        found = self._find(row)
        return None if found is None or found["status"] == "error" else _ids(found)

    def failed(self) -> dict[int, int]:
        """By sequence, its first turn that has failed."""
        first: dict[int, int] = {}
        for sequence, turn in self._each_failed():
            first[sequence] = min(turn, first.get(sequence, turn))
        return first

    def ended(self, sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these have failed, so that none of the turns that are left can run."""
        failed = self.failed()
        return np.array(
            [s in failed and self.left(s)[0] > failed[s] for s in sequences.tolist()], bool
        )

    def left(self, sequence: int) -> list[int]:
        """Turns that are not done."""
        rows = self._turns.row[self._slice(sequence)]
        left: list[int] = np.flatnonzero(~self._done[rows]).tolist()
        return left

    def _each_failed(self) -> Iterator[tuple[int, int]]:
        is_failed = self._frame["status"].to_numpy() == "error"
        rows = self._frame["row_index"].to_numpy()[is_failed]
        places = np.flatnonzero(np.isin(self._turns.row, rows))
        sequences = np.searchsorted(self._turns.bounds, places, side="right") - 1
        yield from zip(
            sequences.tolist(), (places - self._turns.bounds[sequences]).tolist(), strict=True
        )

    def _beginning(self, sequence: int) -> list[int]:
        left = self.left(sequence)
        beginning: list[int] = self._turns.row[self._slice(sequence)][: left[0]].tolist()
        return beginning

    def _slice(self, sequence: int) -> slice:
        turns = self._turns.turns(sequence)
        return slice(turns.start, turns.stop)

    def _turn(self, row: int) -> EarlierTurn:
        found = self._find(row)
        assert found is not None, f"row {row} is done and in no part"
        return EarlierTurn(_ids(found), eviction_log_of(found["eviction_log"]))

    def _find(self, row: int) -> dict[str, Any] | None:
        place = self._place.get(row)
        return None if place is None else self._frame.row(place, named=True)


def eviction_log_of(log: list[dict[str, Any]] | None) -> tuple[EvictionEvent, ...]:
    """As the column `eviction_log` holds it."""
    return tuple(EvictionEvent(e["at"], tuple(map(tuple, e["kept"]))) for e in log or ())


def _ids(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["completion_token_ids"] or ())


def _read(directory: RunDirectory, rows: NDArray[np.int64]) -> pl.DataFrame:
    if not len(rows):
        return pl.DataFrame(schema=dict.fromkeys(_COLUMNS, pl.Null()))
    wanted = pl.Series(np.sort(rows))
    return (
        directory.scan()
        .filter(pl.col("row_index").is_in(wanted.implode()))
        .select(_COLUMNS)
        .collect()
    )
