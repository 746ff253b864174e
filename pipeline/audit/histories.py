"""What was said before a turn: added ids made anew from the input, answers as they are committed.

```
 audited turn 2   | first prompt | answer 0 | added 1 | answer 1 | added 2 |  ─► answer 2
```

Without conversations nothing was said before any row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.engine.verify.story import Story, ToldTurn
from pipeline.job.committed_turns import eviction_log_of
from pipeline.job.job import Job
from pipeline.plan.conversations import join_ids
from pipeline.plan.token_table import Ids
from pipeline.records import EvictionEvent, SamplingParams
from pipeline.storage.run_directory import RunDirectory


class Histories:
    """Of these rows of a run."""

    def __init__(self, job: Job, directory: RunDirectory, rows: Sequence[int]) -> None:
        self._eviction = eviction = job.eviction
        self._evicts = eviction is not None and eviction.evictor != "none"
        self._before = {row: _rows_before(job, row) for row in rows}
        earlier = {row for before in self._before.values() for row in before}
        self.rows = sorted(earlier.union(rows))
        """Those that an audit has to read: the ones asked for and all before them."""
        self._answers = _read_answers(directory, sorted(earlier))
        self._logs = _read_logs(directory, self.rows) if self._evicts else {}

    def prompt(self, row: int, added: Mapping[int, Ids]) -> NDArray[np.int64]:
        """All ids that the answer of `row` follows; `added`: by row, what it adds."""
        rows = [*self._before[row], row]
        ids = added[rows[0]].astype(np.int64)
        for before, now in zip(rows, rows[1:], strict=False):
            answer = self._answers[before]
            ids = np.concatenate([ids, answer[:-1], join_ids(int(answer[-1]), added[now])])
        return ids

    def story(
        self,
        row: int,
        answer: Sequence[int],
        added: Mapping[int, Ids],
        params: Mapping[int, SamplingParams],
        system_tokens: Mapping[int, int],
    ) -> Story | None:
        """Up to the turn of `row`, which answered `answer`; None where nothing is given up. All of
        a row by its number."""
        if not self._evicts:
            return None
        rows = [*self._before[row], row]
        answers = [*(self._answers[before].tolist() for before in rows[:-1]), answer]
        turns = [
            ToldTurn(added[turn].tolist(), said, params[turn].max_new_tokens, self._logs[turn])
            for turn, said in zip(rows, answers, strict=True)
        ]
        return Story(tuple(turns), system_tokens.get(rows[0], 0))

    def fit(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """Of the one answer that is audited: one sample, and of a turn what is left beside all that
        was said before."""
        params = replace(params, n=1)
        if self._eviction is None:
            return params
        return self._eviction.fit(params, prompt_tokens) or replace(params, max_new_tokens=1)


def _rows_before(job: Job, row: int) -> list[int]:
    """The earlier turns of its conversation, in order."""
    turns = job.source.turns
    if turns is None or turns.conversation[row] < 0:
        return []
    low, high = turns.bounds[turns.conversation[row] : turns.conversation[row] + 2]
    rows: list[int] = turns.order[low:high].tolist()
    return rows[: rows.index(row)]


def _read_logs(
    directory: RunDirectory, rows: Sequence[int]
) -> dict[int, tuple[EvictionEvent, ...]]:
    wanted = directory.scan().filter(pl.col("row_index").is_in(rows))
    found = wanted.select("row_index", "eviction_log").collect()
    return {row: eviction_log_of(log) for row, log in found.iter_rows()}


def _read_answers(directory: RunDirectory, rows: Sequence[int]) -> dict[int, NDArray[np.int64]]:
    wanted = directory.scan().filter(pl.col("row_index").is_in(rows))
    found = wanted.select("row_index", "completion_token_ids").collect()
    return {row: np.array(ids, np.int64) for row, ids in found.iter_rows()}
