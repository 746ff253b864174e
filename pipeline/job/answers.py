"""From completions to part files: one output row for each input row. Knows no engine and no device.

```
 completion of a sequence ──► its rows that are not done ──► a full part ──► table ──► write_part
```

A greedy prompt that many rows share runs once; the rows that did not run name the row that did in
`dedup_of`, count their whole prompt as cached and have no prefill time of their own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import Grammars, StopCheck
from pipeline.errors import StorageError, is_row_fault
from pipeline.job.answer_table import (
    Answered,
    Texts,
    answer_of,
    answers_table,
    decode,
    exploded,
    first_row,
)
from pipeline.job.committed_turns import CommittedTurns
from pipeline.job.gathered_samples import GatheredSamples, joined
from pipeline.job.planning import PlannedJob
from pipeline.job.row_scores import ScoreCollector
from pipeline.plan.conversations import join_ids
from pipeline.records import Completion
from pipeline.storage.retried_rows import attempts_before, count_attempts
from pipeline.storage.run_directory import RunDirectory
from pipeline.tokens.answer_text import AnswerText, Ids


@dataclass
class RowCounts:
    """Rows that this session has answered, committed or not, and its parts that are committed;
    read by the progress display. `merged_tokens`: those that end an answer and begin the turn that
    follows it; `evictions` of turns, and those that are `degenerate`, see `TurnState`;
    `scored_requests` of rows that are scored, and tokens of their continuations."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    merged_tokens: int = 0
    forced_tokens: int = 0
    evictions: int = 0
    degenerate: int = 0
    scored_requests: int = 0
    scored_tokens: int = 0
    parts: int = 0


class AnswerWriter:
    """Collects answers and commits a part whenever `rows_per_part` rows are together, or of rows of
    several samples so many answers.

    With `preserve_order`, part n holds the input rows `[n * size, (n + 1) * size)` with
    `size = rows_per_part`, and is committed when the last of them is answered; where rows are
    turns, after those before it, so that no turn is done before the one that it follows.
    """

    def __init__(
        self,
        planned: PlannedJob,
        directory: RunDirectory,
        done: NDArray[np.bool_],
        committed: CommittedTurns | None = None,
    ) -> None:
        """`committed`: of conversations that an earlier session has begun."""
        self.counts = RowCounts()
        self._planned = planned
        self._directory = directory
        self._done = done.copy()
        self._settings = planned.job.settings.write
        self._waiting: dict[int, list[Answered]] = defaultdict(list)
        self._answers_waiting = 0
        self._next_part = directory.next_part_number()
        plan_hash = planned.summary.plan_hash
        self._provenance = {"run_id": directory.run_id, "plan_hash": plan_hash}
        self._rows_of_sequence = _RowsOfSequence(planned.plan.sequence_of_row)
        self._gathered = GatheredSamples(planned)
        block = np.arange(len(done)) // self._settings.rows_per_part
        self._left_in_block = np.bincount(block[~done], minlength=int(block[-1]) + 1)
        self._open_blocks = deque(np.flatnonzero(self._left_in_block).tolist())
        self._scores = None if planned.requests is None else ScoreCollector(planned, done)
        self._attempts = attempts_before(directory)
        parts = directory.footers() if self._settings.preserve_order else ()
        self._begun = {footer.number: footer for footer in parts}
        self._committed = committed
        self._failed_turn = {} if committed is None else committed.failed()

    def add_rejected(self) -> None:
        """Write the rows that cannot run."""
        for row, rejected in sorted(self._planned.rejected.items()):
            self._add(Answered(row, rejected))

    def add_ended(self, sequences: NDArray[np.int64]) -> None:
        """Write what is left of conversations that have failed in an earlier session."""
        for sequence in sequences.tolist():
            assert self._committed is not None
            for turn in self._committed.left(sequence):
                self.add(Completion.after_failed(sequence, turn))

    def add(self, completion: Completion) -> None:
        """Give a sequence's answer to every row that waits for it."""
        plan = self._planned.plan
        if self._scores is not None:
            for scored in self._scores.add(completion):
                self._add(Answered(scored.row, scored.completion, scored))
            return
        completion = self._with_opening(completion)
        first = first_row(plan, completion)
        if plan.conversations is not None:
            self._count_merged(completion)
            self._add(Answered(first, completion))
            return
        samples = self._gathered.add(completion)
        if len(samples) > 1:
            self._add(joined(first, samples, int(plan.table.lengths[first])))
            return
        for row in self._rows_of_sequence[completion.sequence] if samples else ():
            own = completion if row == first else _copied(completion, int(plan.table.lengths[row]))
            self._add(Answered(row, own))

    def _with_opening(self, completion: Completion) -> Completion:
        """The whole answer, which the prompt of the plan holds the beginning of."""
        opening = self._planned.plan.params_of(completion.sequence, completion.turn).opening
        if not opening or completion.finish_reason == "error":
            return completion
        return replace(
            completion,
            token_ids=(*opening, *completion.token_ids),
            forced_tokens=len(opening) + completion.forced_tokens,
        )

    def flush(self) -> None:
        """Commit what waits, also where a part is not full."""
        for block in sorted(self._waiting):
            self._commit(block)

    def _add(self, answered: Answered) -> None:
        if self._done[answered.row]:
            self._compare(answered)
            return
        self._done[answered.row] = True
        completion = answer_of(answered.outcome)
        if completion is None:
            self.counts.failed += 1
        else:
            self.counts.ok += 1
            planned = self._planned.prompt_tokens(answered.row)
            self.counts.prompt_tokens += completion.prompt_tokens or planned
            self.counts.cached_tokens += completion.cached_tokens
            self.counts.forced_tokens += completion.forced_tokens
            if completion.state is not None:
                self.counts.evictions += completion.state.evictions
                self.counts.degenerate += completion.state.degenerate
            if answered.scored is not None and answered.scored.scores is not None:
                token_counts = answered.scored.scores.token_counts
                self.counts.scored_requests += len(token_counts)
                self.counts.scored_tokens += sum(token_counts)
        per_part = self._settings.rows_per_part
        block = answered.row // per_part if self._settings.preserve_order else 0
        self._waiting[block].append(answered)
        self._answers_waiting += max(1, len(answered.samples))
        if not self._settings.preserve_order:
            if self._answers_waiting >= per_part:
                self._commit(block)
        elif self._planned.plan.conversations is None:
            if self._is_full(block):
                self._commit(block)
        else:
            while self._open_blocks and self._is_full(self._open_blocks[0]):
                self._commit(self._open_blocks.popleft())

    def _is_full(self, block: int) -> bool:
        return len(self._waiting.get(block, ())) >= int(self._left_in_block[block])

    def _commit(self, block: int) -> None:
        answered, self._answers_waiting = self._waiting.pop(block), 0
        number = self._next_part
        if self._settings.preserve_order:
            # The part's number is its place in the input, so sorted names give the input order.
            answered.sort(key=lambda a: a.row)
            number = block
        texts: Texts = {}
        if self._scores is None:
            answered, texts = decode(self._planned, answered)
        if self._planned.plan.conversations is not None:
            answered = self._fail_what_follows(answered)
        if self._settings.explode:
            answered = exploded(answered)
        table = answers_table(self._planned, answered, texts)
        table = count_attempts(table, self._attempts)
        begun = self._begun.pop(number, None)
        if begun is None:
            self._directory.write_part(number, table, self._provenance)
        else:
            self._directory.extend_part(begun, table)
        self._next_part += 1
        self.counts.parts += 1

    def _fail_what_follows(self, answered: list[Answered]) -> list[Answered]:
        """Turns after one that has failed, whether in the engine or since it has no text."""
        outcomes = [item.outcome for item in answered]
        for outcome in outcomes:
            if isinstance(outcome, Completion) and answer_of(outcome) is None:
                first = self._failed_turn.get(outcome.sequence, outcome.turn)
                self._failed_turn[outcome.sequence] = min(first, outcome.turn)
        return [
            Answered(item.row, Completion.after_failed(outcome.sequence, outcome.turn))
            if isinstance(outcome, Completion)
            and outcome.turn > self._failed_turn.get(outcome.sequence, outcome.turn)
            else item
            for item, outcome in zip(answered, outcomes, strict=True)
        ]

    def _count_merged(self, completion: Completion) -> None:
        plan, following = self._planned.plan, completion.turn + 1
        if completion.token_ids and following < plan.num_turns(completion.sequence):
            added = plan.table[plan.row_of(completion.sequence, following)]
            fed = join_ids(completion.token_ids[-1], added)
            self.counts.merged_tokens += len(added) + 1 - len(fed)

    def _compare(self, answered: Answered) -> None:
        """A turn that was done before those that it follows, since a part was lost, must have come
        out the same again. Raises StorageError."""
        if self._committed is None:
            return
        before, now = self._committed.answer(answered.row), answer_of(answered.outcome)
        if before is not None and now is not None and before != now.token_ids:
            raise StorageError(
                f"row {answered.row} in {self._directory.name}/data follows from an answer that is "
                "no longer there and came out otherwise this time; delete the part that holds the "
                "row and run the same command again"
            )


class _RowsOfSequence:
    """Rows by sequence, as one sorted array and its cuts."""

    def __init__(self, sequence_of_row: NDArray[np.int64]) -> None:
        self._rows = np.argsort(sequence_of_row, kind="stable")
        num = int(sequence_of_row.max(initial=-1)) + 1
        self._cuts = np.searchsorted(sequence_of_row[self._rows], np.arange(num + 1))

    def __getitem__(self, sequence: int) -> list[int]:
        rows: list[int] = self._rows[self._cuts[sequence] : self._cuts[sequence + 1]].tolist()
        return rows


def stop_check(answers: AnswerText) -> StopCheck:
    """Whether an answer holds a stop string, for an engine here or elsewhere.

    One that has no text ends there: it becomes an error when it is written.
    """
    return partial(_is_stopped, answers)


def grammars_of(planned: PlannedJob) -> Grammars | None:
    """What answers must be in token ids, for an engine here or elsewhere; None: anything."""
    is_guided = any(params.is_guided for params in planned.plan.params)
    return planned.job.tokenizer.grammars if is_guided else None


def _is_stopped(
    answers: AnswerText, token_ids: Sequence[int], stop: tuple[str, ...], prompt: Ids
) -> bool:
    try:
        return answers.has_just_stopped(token_ids, stop, prompt)
    except BaseException as error:
        if not is_row_fault(error):
            raise
        return True


def _copied(completion: Completion, prompt_tokens: int) -> Completion:
    """The answer of the row that ran, as it counts for a row that did not."""
    timing = replace(completion.timing, prefill_s=0.0)
    return replace(completion, cached_tokens=prompt_tokens, timing=timing)
