"""From completions to part files: one output row for each input row. Knows no engine and no device.

```
 completion of a sequence ──► its rows that are not done ──► a full part ──► table ──► write_part
```

A greedy prompt that many rows share runs once; the rows that did not run name the row that did in
`dedup_of`, count their whole prompt as cached and have no prefill time of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.engine.base import StopCheck
from pipeline.errors import is_row_fault
from pipeline.job.planning import PlannedJob
from pipeline.job.row_faults import call_by_halves, sentence
from pipeline.records import Completion, Rejected, Timing
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.schema import carry_columns, result_fields
from pipeline.tokens.answer_text import AnswerText, Ids


class Answered(NamedTuple):
    """An input row and what became of it."""

    row: int
    outcome: Completion | Rejected


@dataclass
class RowCounts:
    """Rows that this session has answered, committed or not, and its parts that are committed;
    read by the progress display."""

    ok: int = 0
    failed: int = 0
    cached_tokens: int = 0
    parts: int = 0


class AnswerWriter:
    """Collects answers and commits a part whenever `rows_per_part` rows are together.

    With `preserve_order`, part n holds the input rows `[n * size, (n + 1) * size)` with
    `size = rows_per_part`, and is committed when the last of them is answered.
    """

    def __init__(
        self, planned: PlannedJob, directory: RunDirectory, done: NDArray[np.bool_]
    ) -> None:
        self.counts = RowCounts()
        self._planned = planned
        self._directory = directory
        self._done = done.copy()
        self._settings = planned.job.settings.write
        self._waiting: dict[int, list[Answered]] = defaultdict(list)
        self._next_part = directory.next_part_number()
        plan_hash = planned.summary.plan_hash
        self._provenance = {"run_id": directory.run_id, "plan_hash": plan_hash}
        self._rows_of_sequence = _RowsOfSequence(planned.plan.sequence_of_row)
        block = np.arange(len(done)) // self._settings.rows_per_part
        self._left_in_block = np.bincount(block[~done], minlength=int(block[-1]) + 1)

    def add_rejected(self) -> None:
        """Write the rows that cannot run."""
        for row, rejected in sorted(self._planned.rejected.items()):
            self._add(Answered(row, rejected))

    def add(self, completion: Completion) -> None:
        """Give a sequence's answer to every row that waits for it."""
        plan = self._planned.plan
        first = int(plan.sequences.row[completion.sequence])
        for row in self._rows_of_sequence[completion.sequence]:
            own = completion if row == first else _copied(completion, int(plan.table.lengths[row]))
            self._add(Answered(row, own))

    def flush(self) -> None:
        """Commit what waits, also where a part is not full."""
        for block in sorted(self._waiting):
            self._commit(block)

    def _add(self, answered: Answered) -> None:
        if self._done[answered.row]:
            return
        self._done[answered.row] = True
        completion = _answer(answered.outcome)
        if completion is None:
            self.counts.failed += 1
        else:
            self.counts.ok += 1
            self.counts.cached_tokens += completion.cached_tokens
        per_part = self._settings.rows_per_part
        block = answered.row // per_part if self._settings.preserve_order else 0
        waiting = self._waiting[block]
        waiting.append(answered)
        full = int(self._left_in_block[block]) if self._settings.preserve_order else per_part
        if len(waiting) >= full:
            self._commit(block)

    def _commit(self, block: int) -> None:
        answered = self._waiting.pop(block)
        number = self._next_part
        if self._settings.preserve_order:
            # The part's number is its place in the input, so sorted names give the input order.
            answered.sort(key=lambda a: a.row)
            number = block
        table = answers_table(self._planned, answered)
        self._directory.write_part(number, table, self._provenance)
        self._next_part += 1
        self.counts.parts += 1


class _RowsOfSequence:
    """Rows by sequence, as one sorted array and its cuts."""

    def __init__(self, sequence_of_row: NDArray[np.int64]) -> None:
        self._rows = np.argsort(sequence_of_row, kind="stable")
        num = int(sequence_of_row.max(initial=-1)) + 1
        self._cuts = np.searchsorted(sequence_of_row[self._rows], np.arange(num + 1))

    def __getitem__(self, sequence: int) -> list[int]:
        rows: list[int] = self._rows[self._cuts[sequence] : self._cuts[sequence + 1]].tolist()
        return rows


def answers_table(planned: PlannedJob, answered: list[Answered]) -> pa.Table:
    """The output columns of these rows, then every column that the input brought."""
    texts, faults = _decode(planned, answered)
    answered = [_as_decoded(item, faults) for item in answered]
    rows = [_output_row(planned, item, texts) for item in answered]
    fields = result_fields(planned.segments is not None)
    results = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    source = planned.job.source
    inputs = source.take(np.array([item.row for item in answered], np.int64))
    return carry_columns(results, inputs, source.columns.id)


def _decode(
    planned: PlannedJob, answered: list[Answered]
) -> tuple[dict[int, str], dict[int, BaseException]]:
    """Text by sequence, cut before the stop string that ended it; or why there is none."""
    completions = {c.sequence: c for a in answered if (c := _answer(a.outcome)) is not None}
    plan, text = planned.plan, planned.job.tokenizer.answers
    items = [
        (plan.prompt_token_ids(sequence), completion.token_ids,
         plan.params[int(plan.sequences.params[sequence])].stop)
        for sequence, completion in completions.items()
    ]  # fmt: skip
    sequences = list(completions)
    texts: dict[int, str] = {}
    faults: dict[int, BaseException] = {}

    def decode(some: Sequence[tuple[Ids, Ids, tuple[str, ...]]]) -> list[str]:
        return text.decode([p for p, _, _ in some], [a for _, a, _ in some], [s for *_, s in some])

    for start, decoded in call_by_halves(decode, items):
        if isinstance(decoded, BaseException):
            faults[sequences[start]] = decoded
        else:
            texts |= zip(sequences[start:], decoded, strict=False)
    return texts, faults


def _as_decoded(item: Answered, faults: dict[int, BaseException]) -> Answered:
    """An error where the answer has no text."""
    outcome = item.outcome
    if isinstance(outcome, Rejected) or outcome.sequence not in faults:
        return item
    message = sentence("the answer cannot be turned into text", faults[outcome.sequence])
    failed = replace(outcome, finish_reason="error", error_type="BadAnswer", error_message=message)
    return Answered(item.row, failed)


def stop_check(answers: AnswerText) -> StopCheck:
    """Whether an answer holds a stop string, for an engine here or elsewhere.

    One that has no text ends there: it becomes an error when it is written.
    """
    return partial(_is_stopped, answers)


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


def _answer(outcome: Completion | Rejected) -> Completion | None:
    """The completion if it holds an answer."""
    if isinstance(outcome, Rejected) or outcome.finish_reason == "error":
        return None
    return outcome


def _output_row(planned: PlannedJob, item: Answered, texts: dict[int, str]) -> dict[str, Any]:
    plan, row = planned.plan, item.row
    group = int(plan.group_of_row[row])
    columns = {
        "id": planned.ids[row],
        "row_index": row,
        "group_id": None if group < 0 else planned.group_id(group),
        "reuse_depth": int(plan.reuse_depth[row]),
        "prompt_tokens": int(plan.table.lengths[row]),
        **_document_columns(planned, row),
    }
    if isinstance(item.outcome, Rejected):
        return columns | _failed(item.outcome.error_type, item.outcome.message, attempts=0)
    first = int(plan.sequences.row[item.outcome.sequence])
    columns["dedup_of"] = None if row == first else planned.ids[first]
    completion = _answer(item.outcome)
    if completion is None:
        reason, message = item.outcome.error_type, item.outcome.error_message
        return columns | _failed(reason or "EngineError", message or "no reason given", attempts=1)
    return columns | _succeeded(completion, texts[completion.sequence])


def _document_columns(planned: PlannedJob, row: int) -> dict[str, Any]:
    """Nothing where prompts are in one piece; `exact`: as if nothing had been reused."""
    counts, asked = planned.counts, planned.job.settings.reuse
    if counts is None:
        return {}
    is_prefix = planned.plan.documents is None
    documents, soft_tokens = int(counts.documents[row]), int(counts.soft_tokens[row])
    alone = 1 if asked.context == "preamble" and not soft_tokens else 0
    return {
        "reuse_mode": "prefix" if is_prefix else asked.reuse,
        "exact": is_prefix or documents <= alone,
        "documents": documents,
        "document_tokens": int(counts.document_tokens[row]),
        "repaired_tokens": int(counts.repaired_tokens[row]),
        "link_tokens": soft_tokens,
        "fallback_reason": planned.fallback_reason,
    }


def _succeeded(completion: Completion, text: str) -> dict[str, Any]:
    return {
        "generated_text": text,
        "finish_reason": completion.finish_reason,
        "completion_tokens": len(completion.token_ids),
        "cached_tokens": completion.cached_tokens,
        "reuse_source": _source(completion),
        **asdict(completion.timing),
        "status": "ok",
        "attempts": 1,
        "completion_token_ids": completion.token_ids,
    }


def _source(completion: Completion) -> str:
    """Where the KV that this row did not compute came from."""
    if completion.stored_tokens:
        return "store"
    return "run" if completion.cached_tokens else "none"


def _failed(error_type: str, message: str, attempts: int) -> dict[str, Any]:
    return {
        "finish_reason": "error",
        "completion_tokens": 0,
        "cached_tokens": 0,
        "reuse_source": "none",
        **asdict(Timing()),
        "status": "error",
        "error_type": error_type,
        "error_message": message,
        "attempts": attempts,
        "completion_token_ids": [],
    }
