"""What became of input rows, as a table of the output. Knows no engine, no device and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.inputs.choices import Choices
from pipeline.inputs.overrides import rows_with_tools
from pipeline.job.answer_columns import Shown, logprobs_column, samples_column
from pipeline.job.answer_texts import Said
from pipeline.job.outcome_columns import failed_columns, state_columns, succeeded_columns
from pipeline.job.parsed import guided_columns
from pipeline.job.planning import PlannedJob
from pipeline.job.question_answers import question_columns
from pipeline.job.row_faults import call_by_halves, sentence
from pipeline.job.row_scores import NoLikelyChoice, ScoredRow, score_columns
from pipeline.job.row_tools import add_tool_calls
from pipeline.plan.plan import Plan
from pipeline.prompts import Rejected
from pipeline.records import PRIOR_TURN_FAILED, Completion
from pipeline.storage.schema import carry_columns, result_fields
from pipeline.tokens.reasoning import AnswerParts


class Answered(NamedTuple):
    """An input row and what became of it; `scored`: where it is scored. `samples`: all of them,
    where it has several, of which the outcome is the first; `sample_index`: where each of them is a
    row of the output, which one."""

    row: int
    outcome: Completion | Rejected
    scored: ScoredRow | None = None
    samples: tuple[Completion, ...] = ()
    sample_index: int = 0

    def completions(self) -> tuple[Completion, ...]:
        """Those that hold answers."""
        answer = answer_of(self.outcome)
        if answer is None:
            return ()
        return self.samples or (answer,)


Texts = Mapping[tuple[int, int], AnswerParts]
"""Of answers, by sequence and turn."""


def key_of(completion: Completion) -> tuple[int, int]:
    """What `Texts` has its text by."""
    return completion.sequence, completion.turn


def answer_of(outcome: Completion | Rejected) -> Completion | None:
    """The completion if it holds an answer."""
    if isinstance(outcome, Rejected) or outcome.finish_reason == "error":
        return None
    return outcome


def first_row(plan: Plan, completion: Completion) -> int:
    """The row that ran for this answer."""
    return plan.row_of(completion.sequence, completion.turn)


def decode(planned: PlannedJob, answered: Sequence[Answered]) -> tuple[list[Answered], Texts]:
    """The same rows, an error where an answer has no text; and the text of each answer, cut before
    the stop string that ended it unless the row wants it otherwise, apart from what was thought
    before it."""
    job = planned.job
    completions = {key_of(c): c for a in answered for c in a.completions()}
    items = [_said(planned, completion) for completion in completions.values()]
    keys = list(completions)
    texts: dict[tuple[int, int], AnswerParts] = {}
    faults: dict[tuple[int, int], str] = {}
    for start, decoded in call_by_halves(job.decode, items):
        if isinstance(decoded, BaseException):
            faults[keys[start]] = sentence("the answer cannot be turned into text", decoded)
        else:
            texts |= zip(keys[start:], decoded, strict=False)
    return [_as_decoded(item, faults) for item in answered], texts


def _said(planned: PlannedJob, completion: Completion) -> Said:
    """Behind the prompt without the opening, which is of the answer."""
    row = first_row(planned.plan, completion)
    prompt, opening = planned.plan.table[row], planned.opening(row)
    own = prompt[: len(prompt) - len(opening)]
    params = planned.plan.params_of(*key_of(completion))
    return Said(own, completion.token_ids, completion.finish_reason, params)


def _as_decoded(item: Answered, faults: Mapping[tuple[int, int], str]) -> Answered:
    messages = (faults.get(key_of(completion)) for completion in item.completions())
    message = next((message for message in messages if message is not None), None)
    return item if message is None else Answered(item.row, failed(item.outcome, message))


def exploded(answered: Sequence[Answered]) -> list[Answered]:
    """A row for each sample."""
    return [
        Answered(item.row, sample, sample_index=index)
        for item in answered
        for index, sample in enumerate(item.samples or (item.outcome,))
    ]


def failed(
    outcome: Completion | Rejected, message: str, error_type: str = "BadAnswer"
) -> Completion:
    """The same completion as an error."""
    assert isinstance(outcome, Completion)
    return replace(outcome, finish_reason="error", error_type=error_type, error_message=message)


def answers_table(planned: PlannedJob, answered: Sequence[Answered], texts: Texts) -> pa.Table:
    """The output columns of these rows, then every column that the input brought."""
    source, columns = planned.job.source, planned.columns
    inputs = source.take(np.array([item.row for item in answered], np.int64))
    if columns.scored is None:
        rows = [_output_row(planned, item, texts) for item in answered]
        if columns.tool_calls:
            add_tool_calls(planned, answered, rows, rows_with_tools(inputs, columns))
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
            results = _with_column(results, name, column)
    for name, column in _nested_columns(planned, answered, texts).items():
        results = _with_column(results, name, column)
    return carry_columns(results, inputs, columns)


def _with_column(results: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return results.set_column(results.schema.get_field_index(name), name, column)


def _nested_columns(
    planned: PlannedJob, answered: Sequence[Answered], texts: Texts
) -> dict[str, pa.Array]:
    columns, spell = planned.columns, planned.job.tokenizer.answers.spell
    found = {}
    if columns.has_logprobs:
        answers = [answer_of(item.outcome) for item in answered]
        found["logprobs"] = logprobs_column(answers, spell)
    if columns.has_samples and not columns.is_exploded:
        rows = [
            [Shown(c, texts[key_of(c)]) for c in item.completions()] or None for item in answered
        ]
        found["samples"] = samples_column(rows, spell, columns.has_logprobs, columns.reasoning)
    return found


def _planned_columns(planned: PlannedJob, item: Answered) -> dict[str, Any]:
    """What the plan says of a row."""
    plan, first = planned.plan, planned.first_in_table(item.row)
    group = int(plan.group_of_row[first])
    return {
        "id": planned.ids[item.row],
        "row_index": item.row,
        "group_id": None if group < 0 else planned.group_id(group),
        "reuse_depth": _within_prompt(planned, item.row, int(plan.reuse_depth[first])),
        "prompt_tokens": _prompt_tokens(planned, item),
    }


def _scored_row(
    planned: PlannedJob, item: Answered, choices: Choices, cell: object
) -> dict[str, Any]:
    columns, outcome, scored = _planned_columns(planned, item), item.outcome, item.scored
    if isinstance(outcome, Rejected):
        return columns | failed_columns(outcome.error_type, outcome.message, attempts=0)
    assert scored is not None and planned.requests is not None
    by = scored.computed_by
    columns["dedup_of"] = None if by == item.row else planned.ids[by]
    if scored.scores is None:
        reason, message = outcome.error_type or "EngineError", outcome.error_message
        return columns | failed_columns(reason, message or "no reason given", attempts=1)
    cut, asked = int(planned.requests.cut[item.row]), planned.job.settings.scoring
    try:
        if choices.sheet is not None:
            questions = choices.sheet.questions
            scores = question_columns(scored.scores, questions, cut, asked.normalize)
        else:
            texts = () if choices.are_prompts else choices.read(cell)
            scores = score_columns(scored.scores, texts, cut, asked)
    except NoLikelyChoice as error:
        return columns | failed_columns("NoLikelyChoice", str(error), attempts=1)
    return columns | succeeded_columns(outcome, None) | {"finish_reason": None} | scores


def _output_row(planned: PlannedJob, item: Answered, texts: Texts) -> dict[str, Any]:
    plan, row = planned.plan, item.row
    columns = _planned_columns(planned, item) | _document_columns(planned, item)
    if planned.columns.is_exploded:
        columns["sample_index"] = item.sample_index
    if isinstance(item.outcome, Rejected):
        return columns | failed_columns(item.outcome.error_type, item.outcome.message, attempts=0)
    first = first_row(plan, item.outcome)
    columns["dedup_of"] = None if row == first else planned.ids[first]
    completion = answer_of(item.outcome)
    if completion is None:
        reason, message = item.outcome.error_type, item.outcome.error_message
        attempts = 0 if reason == PRIOR_TURN_FAILED else 1
        return columns | failed_columns(
            reason or "EngineError", message or "no reason given", attempts
        )
    said = texts[key_of(completion)]
    columns |= succeeded_columns(completion, said.text) | state_columns(completion.state)
    if planned.job.reasoning is not None:
        columns |= {"reasoning": said.reasoning, "reasoning_tokens": said.reasoning_tokens}
    columns["cached_tokens"] = _within_prompt(planned, row, columns["cached_tokens"])
    if planned.columns.is_guided:
        columns |= guided_columns(planned, completion, _said(planned, completion), said.text)
    return columns


def _prompt_tokens(planned: PlannedJob, item: Answered) -> int | None:
    """None: of a later turn that did not come so far that its history was known."""
    outcome, plan = item.outcome, planned.plan
    if isinstance(outcome, Completion) and plan.conversations is not None:
        if outcome.turn or outcome.prompt_tokens:
            return outcome.prompt_tokens or None
    return planned.prompt_tokens(item.row)


def _within_prompt(planned: PlannedJob, row: int, count: int) -> int:
    """Of so many of the first tokens of a prompt of the plan, those that are not of the answer."""
    opening = planned.opening(row)
    return min(count, planned.prompt_tokens(row)) if opening else count


def _document_columns(planned: PlannedJob, item: Answered) -> dict[str, Any]:
    """Nothing where prompts are in one piece, or cannot run; `exact`: as if nothing had been
    reused, null without an answer."""
    counts, asked, row = planned.counts, planned.job.settings.reuse, item.row
    if counts is None or isinstance(item.outcome, Rejected):
        return {}
    is_prefix, is_answered = planned.plan.documents is None, answer_of(item.outcome) is not None
    documents, soft_tokens = int(counts.documents[row]), int(counts.soft_tokens[row])
    alone = 1 if asked.context == "preamble" and not soft_tokens else 0
    return {
        "reuse_mode": "prefix" if is_prefix else asked.reuse,
        "exact": is_prefix or documents <= alone if is_answered else None,
        "documents": documents,
        "document_tokens": int(counts.document_tokens[row]),
        "repaired_tokens": int(counts.repaired_tokens[row]),
        "link_tokens": soft_tokens,
        "fallback_reason": planned.fallback_reason,
    }
