"""A stride: steps of the same rows, each fed on the device by the one before, and read one late.

```
 device   step 0          | step 1          | step 2          | step 3
 host      start step 1, read 0 | start step 2, read 1 | ...
 row a     token           | token           | its end         | dropped
```

Between two strides everything is as if the steps had been made one by one. Within one no row leaves
and none comes: one that has ended computes on until the stride is over, and what it computes then
is dropped. A stride is over when an eighth of its rows have ended: so many cost the device next to
nothing, whose sizes of steps are padded anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.answering import Answering, End
from pipeline.engine.cuda_graphs import DecodeRunner
from pipeline.engine.forwards import Forwards
from pipeline.engine.live import LiveRow
from pipeline.engine.memory import is_exhausted
from pipeline.engine.row_kinds import Kinds
from pipeline.engine.sampling import Sampled
from pipeline.engine.step_memory import DecodeStep, StepMemory
from pipeline.records import FinishReason

STEPS: Final = 32
"""Of a stride, at most: what a caller who wants to stop waits for."""
_IDLE_SHARE: Final = 8  # one of so many rows may have ended before a stride is over


class Strides:
    """Those of one run."""

    def __init__(self, answering: Answering, forwards: Forwards, runner: DecodeRunner) -> None:
        self._answering: Final = answering
        self._forwards: Final = forwards
        self._runner: Final = runner

    def run(self, rows: list[LiveRow], step: DecodeStep, most: int) -> list[End] | None:
        """At most so many steps of these rows, `step` being the first; the rows that end. None, and
        nothing done, where a token must be on the host before the next one is chosen."""
        kinds = self._answering.kinds.of(rows)
        if not kinds.is_plain.all():
            return None
        said = _Said(rows, kinds, self._answering)
        forwards = self._forwards
        with forwards.stepping():
            memory = self._runner.start(step)
            forwards.counters.num_forwards += 1
            started = 1
            while said.steps < started:
                if started < most and said.is_worth(started):
                    if self._go_on(memory, said.left > started):
                        forwards.counters.num_forwards += 1
                        started += 1
                    else:
                        most = started
                said.note(memory.read(), forwards)
        forwards.counters.generated_tokens += said.settle()
        return said.ends

    def _go_on(self, memory: StepMemory, goes_on: NDArray[np.bool_]) -> bool:
        """False where memory ends: the next stride meets that at its first step, and halves it."""
        try:
            self._runner.go_on(memory, goes_on)
        except (MemoryError, RuntimeError) as error:
            if not is_exhausted(error):
                raise
            return False
        return True


@dataclass(eq=False)
class _Said:
    """What the rows of a stride say. `left` [rows]: tokens that each may still have; `steps`: as
    many were read; `taken` [rows]: as many of them count."""

    rows: list[LiveRow]
    kinds: Kinds
    answering: Answering
    ends: list[End] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        lengths = np.array([len(row.token_ids) for row in self.rows], np.int64)
        self.left = self.kinds.most - lengths
        self.taken = np.zeros(len(self.rows), np.int64)
        self._is_going = np.ones(len(self.rows), bool)
        self._touched = np.flatnonzero(self.kinds.is_touched).tolist()
        self._token_ids: list[NDArray[np.int64]] = []

    def is_worth(self, step: int) -> bool:
        """Whether, as far as is known, few enough rows have ended before this step."""
        going = int(np.count_nonzero(self._is_going & (self.left > step)))
        return going > 0 and (len(self.rows) - going) * _IDLE_SHARE <= len(self.rows)

    def note(self, chosen: Sampled, forwards: Forwards) -> None:
        """The tokens of the next step."""
        self.steps += 1
        self._token_ids.append(chosen.token_ids)
        over = self.kinds.ends_by(chosen)
        over |= self.left == self.steps
        over &= self._is_going
        reasons = self._touch(chosen) if self._touched else {}
        over[list(reasons)] = True
        if over.any():
            now_s = forwards.now()
            for i in np.flatnonzero(over).tolist():
                self._end(i, reasons.get(i) or self._reason(i, chosen), now_s)

    def _touch(self, chosen: Sampled) -> dict[int, FinishReason]:
        """Rows that say themselves whether they end have their tokens at once; those that do."""
        self._touched = [i for i in self._touched if self._is_going[i]]
        reasons = {}
        for i in self._touched:
            self.rows[i].token_ids.append(int(chosen.token_ids[i]))
            reason = self._reason(i, chosen)
            if reason is not None:
                reasons[i] = reason
        return reasons

    def _reason(self, place: int, chosen: Sampled) -> FinishReason | None:
        row = self.rows[place]
        if not self.kinds.is_touched[place]:
            row.token_ids += [int(ids[place]) for ids in self._token_ids]
        return self.answering.why_over(row) if chosen.is_finite[place] else "error"

    def _end(self, place: int, reason: FinishReason | None, now_s: float) -> None:
        assert reason is not None, f"row {place} of a stride ends for no reason"
        self.taken[place] = self.steps
        self._is_going[place] = False
        self.ends.append(End(self.rows[place], reason, now_s))

    def settle(self) -> int:
        """Give the rows that go on what they have said; how many tokens all of them have."""
        going = self._is_going
        self.taken[going] = self.steps
        columns = np.stack(self._token_ids, 1).tolist()
        for i in np.flatnonzero(going & ~self.kinds.is_touched).tolist():
            self.rows[i].token_ids += columns[i]
        return int(self.taken.sum())
