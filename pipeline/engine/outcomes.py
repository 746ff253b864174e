"""What becomes of rows: the tokens that they get, and the completions of those that end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from torch import Tensor

from pipeline.engine.answering import Answering, End
from pipeline.engine.completions import complete, complete_scored, fail
from pipeline.engine.forwards import Forwards
from pipeline.engine.live import LiveRow
from pipeline.engine.sampling import Sampled
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.scorer import Scorer
from pipeline.engine.spans import SharedPlacement
from pipeline.engine.turns import Turns
from pipeline.records import Completion


class Outcomes:
    """Those of one run."""

    def __init__(
        self, answering: Answering, scheduler: Scheduler, forwards: Forwards, turns: Turns | None
    ) -> None:
        self.finished: list[Completion] = []
        self._answering: Final = answering
        self._scheduler: Final = scheduler
        self._forwards: Final = forwards
        self._turns: Final = turns

    def take(self) -> list[Completion]:
        """All completions since the last call."""
        done, self.finished = self.finished, []
        return done

    def append(self, rows: list[LiveRow], logits: Tensor, greedy: Sampled | None = None) -> None:
        """Sample the next token of each row; rows that end are finished. See `Answering.append`."""
        if not rows:
            return
        begin = time.perf_counter()
        started = [row for row in rows if not row.token_ids]
        before = self._forced(rows)
        ended = self._answering.append(rows, logits, greedy)
        forced = self._forced(rows) - before
        self._scheduler.changes += forced > 0  # rows with forced tokens wait
        self._forwards.count_busy(begin)
        now = self._forwards.now()
        for row in started:
            row.first_token_s = now
        self.finish([End(row, reason, now) for row, reason in ended])
        counters = self._forwards.counters
        counters.generated_tokens += len(rows) + forced
        counters.forced_tokens += forced

    def finish(self, ends: Iterable[End]) -> None:
        """Rows that have said their last tokens."""
        for end in ends:
            self.end(end.row, complete(end.row, end.reason, end.now_s))

    def end(self, row: LiveRow, completion: Completion) -> None:
        if self._turns is None:
            self._scheduler.finish(row)
            self.finished.append(completion)
        else:
            self.finished += self._turns.end(row, completion, self._forwards.now())
        cache = self._forwards.cache
        self._forwards.counters.peak_kv_bytes = cache.peak_tokens * cache.bytes_per_token

    def end_scored(self, targets: Iterable[SharedPlacement | LiveRow], scorer: Scorer) -> None:
        """Rows all of whose prompt was computed, and read where it is asked for."""
        now = self._forwards.now()
        for row in targets:
            if isinstance(row, LiveRow) and not row.has_ended:
                row.first_token_s = now
                self.end(row, complete_scored(row, scorer.scored(row.sequence), now))

    def lose(self, target: SharedPlacement | LiveRow, error: BaseException) -> None:
        """Rows that need `target` become errors, never the job."""
        message = f"not even one token fits into memory: {str(error).splitlines()[0]}"
        for row in self._scheduler.rows_below(target):
            self.end(row, fail(row, message, self._forwards.now()))
        self._scheduler.evict_idle()  # what was not computed must not be found by later rows

    def _forced(self, rows: list[LiveRow]) -> int:
        return sum(row.forced_tokens for row in rows) if self._answering.has_guides else 0
