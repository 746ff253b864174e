"""What became of input rows, as a table of the output. Knows no engine, no device and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.inputs.choices import Choices
from pipeline.job.planning import PlannedJob
from pipeline.job.row_faults import call_by_halves, sentence
from pipeline.job.row_scores import ScoredRow, score_columns
from pipeline.plan.plan import Plan
from pipeline.records import PRIOR_TURN_FAILED, Completion, Rejected, Timing, TurnState
from pipeline.storage.schema import carry_columns, result_fields
from pipeline.tokens.answer_text import Ids


class Answered(NamedTuple):
    """An input row and what became of it; `scored`: where it is scored."""

    row: int
    outcome: Completion | Rejected
    scored: ScoredRow | None = None


def answer_of(outcome: Completion | Rejected) -> Completion | None:
    """The completion if it holds an answer."""
    if isinstance(outcome, Rejected) or outcome.finish_reason == "error":
        return None
    return outcome


def first_row(plan: Plan, completion: Completion) -> int:
    """The row that ran for this answer."""
    return plan.row_of(completion.sequence, completion.turn)


def decode(
    planned: PlannedJob, answered: Sequence[Answered]
) -> tuple[list[Answered], dict[int, str]]:
    """The same rows, an error where the answer has no text; and the text of each answer by the row
    that ran, cut before the stop string that ended it."""
    plan, text = planned.plan, planned.job.tokenizer.answers
    completions = {
        first_row(plan, c): c for a in answered if (c := answer_of(a.outcome)) is not None
    }
    items = [
        (plan.table[row], completion.token_ids,
         plan.params_of(completion.sequence, completion.turn).stop)
        for row, completion in completions.items()
    ]  # fmt: skip
    rows = list(completions)
    texts: dict[int, str] = {}
    faults: dict[int, str] = {}

    def decode_some(some: Sequence[tuple[Ids, Ids, tuple[str, ...]]]) -> list[str]:
        return text.decode([p for p, _, _ in some], [a for _, a, _ in some], [s for *_, s in some])

    for start, decoded in call_by_halves(decode_some, items):
        if isinstance(decoded, BaseException):
            faults[rows[start]] = sentence("the answer cannot be turned into text", decoded)
        else:
            texts |= zip(rows[start:], decoded, strict=False)
    return [_as_decoded(plan, item, faults) for item in answered], texts


def _as_decoded(plan: Plan, item: Answered, faults: Mapping[int, str]) -> Answered:
    completion = answer_of(item.outcome)
    message = None if completion is None else faults.get(first_row(plan, completion))
    return item if message is None else Answered(item.row, failed(item.outcome, message))


def failed(
    outcome: Completion | Rejected, message: str, error_type: str = "BadAnswer"
) -> Completion:
    """The same completion as an error."""
    assert isinstance(outcome, Completion)
    return replace(outcome, finish_reason="error", error_type=error_type, error_message=message)


def answers_table(
    planned: PlannedJob, answered: Sequence[Answered], texts: Mapping[int, str]
) -> pa.Table:
    """The output columns of these rows, then every column that the input brought."""
    source = planned.job.source
    columns = source.columns
    inputs = source.take(np.array([item.row for item in answered], np.int64))
    if columns.scored is None:
        rows = [_output_row(planned, item, texts) for item in answered]
    else:
        cells = columns.scored.cells(inputs)
        rows = [
            _scored_row(planned, item, columns.scored, cell)
            for item, cell in zip(answered, cells, strict=True)
        ]
    results = pa.Table.from_pylist(rows, schema=pa.schema(result_fields(columns)))
    if source.turns is not None and columns.conversation is not None:
        numbers = source.turns.numbers([item.row for item in answered])
        names = inputs.column(columns.conversation).cast(pa.string())
        for name, column in (("conversation_id", names), ("turn", pa.array(numbers, pa.int64()))):
            results = results.set_column(results.schema.get_field_index(name), name, column)
    return carry_columns(results, inputs, columns)


def _planned_columns(planned: PlannedJob, item: Answered) -> dict[str, Any]:
    """What the plan says of a row."""
    plan, first = planned.plan, planned.first_in_table(item.row)
    group = int(plan.group_of_row[first])
    return {
        "id": planned.ids[item.row],
        "row_index": item.row,
        "group_id": None if group < 0 else planned.group_id(group),
        "reuse_depth": int(plan.reuse_depth[first]),
        "prompt_tokens": _prompt_tokens(planned, item),
    }


def _scored_row(
    planned: PlannedJob, item: Answered, choices: Choices, cell: object
) -> dict[str, Any]:
    columns, outcome, scored = _planned_columns(planned, item), item.outcome, item.scored
    if isinstance(outcome, Rejected):
        return columns | _failed(outcome.error_type, outcome.message, attempts=0)
    assert scored is not None and planned.requests is not None
    by = scored.computed_by
    columns["dedup_of"] = None if by == item.row else planned.ids[by]
    if scored.scores is None:
        reason, message = outcome.error_type or "EngineError", outcome.error_message
        return columns | _failed(reason, message or "no reason given", attempts=1)
    texts = () if choices.are_prompts else choices.read(cell)
    cut, asked = int(planned.requests.cut[item.row]), planned.job.settings.scoring
    scores = score_columns(scored.scores, texts, cut, asked)
    if scores is None:
        message = "the model gives every choice the probability 0, so none of them is the likeliest"
        return columns | _failed("NoLikelyChoice", message, attempts=1)
    return columns | _succeeded(outcome, None) | {"finish_reason": None} | scores


def _output_row(planned: PlannedJob, item: Answered, texts: Mapping[int, str]) -> dict[str, Any]:
    plan, row = planned.plan, item.row
    columns = _planned_columns(planned, item) | _document_columns(planned, row)
    if isinstance(item.outcome, Rejected):
        return columns | _failed(item.outcome.error_type, item.outcome.message, attempts=0)
    first = first_row(plan, item.outcome)
    columns["dedup_of"] = None if row == first else planned.ids[first]
    completion = answer_of(item.outcome)
    if completion is None:
        reason, message = item.outcome.error_type, item.outcome.error_message
        attempts = 0 if reason == PRIOR_TURN_FAILED else 1
        return columns | _failed(reason or "EngineError", message or "no reason given", attempts)
    return columns | _succeeded(completion, texts[first]) | _state_columns(completion.state)


def _prompt_tokens(planned: PlannedJob, item: Answered) -> int | None:
    """None: of a later turn that did not come so far that its history was known."""
    outcome, plan = item.outcome, planned.plan
    if isinstance(outcome, Completion) and plan.conversations is not None:
        if outcome.turn or outcome.prompt_tokens:
            return outcome.prompt_tokens or None
    return planned.prompt_tokens(item.row)


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


def _state_columns(state: TurnState | None) -> dict[str, Any]:
    """Of the cache at the end of a turn; nothing where the engine says nothing of it."""
    if state is None:
        return {}
    log = [{"at": event.at, "kept": list(map(list, event.kept))} for event in state.eviction_log]
    numbers = {name: getattr(state, name) for name in TurnState.__slots__}
    return numbers | {"eviction_log": log}


def _succeeded(completion: Completion, text: str | None) -> dict[str, Any]:
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
