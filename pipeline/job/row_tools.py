"""Calls of tools in answers become a column; the text that is left is the answer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.job.answer_texts import split_of
from pipeline.records import Completion
from pipeline.tokens.reasoning import ReasoningTags

if TYPE_CHECKING:
    from pipeline.job.answer_table import Answered
    from pipeline.job.planning import PlannedJob


def add_tool_calls(
    planned: PlannedJob,
    answered: Sequence[Answered],
    rows: Sequence[dict[str, Any]],
    has_tools: Sequence[bool],
) -> None:
    """Put the calls of answered rows that have tools into their columns, an empty list where an
    answer calls none."""
    tokenizer = planned.job.tokenizer
    form = tokenizer.tool_calls
    asked = [
        (row, item.outcome)
        for row, item, has in zip(rows, answered, has_tools, strict=True)
        if has and row["status"] == "ok" and isinstance(item.outcome, Completion)
    ]
    if form is None or not asked:
        return
    texts = [str(row["generated_text"]) for row, _ in asked]
    if form.needs_control_tokens:
        ids = [_answer_ids(planned, completion) for _, completion in asked]
        texts = tokenizer.decode_batch(ids, specials=True)
    found = form.read_all(texts)
    for (row, _), said in zip(asked, found, strict=True):
        row["tool_calls"] = [call._asdict() for call in said.calls]
        if said.calls:
            row["generated_text"] = said.text


def _answer_ids(planned: PlannedJob, completion: Completion) -> Sequence[int]:
    """Of an answer, without what was thought before it."""
    tags: ReasoningTags | None = planned.job.reasoning
    plan = planned.plan
    prompt = plan.table[plan.row_of(completion.sequence, completion.turn)]
    params = plan.params_of(completion.sequence, completion.turn)
    split = None if tags is None else split_of(tags, prompt, completion.token_ids, params)
    return completion.token_ids if split is None else completion.token_ids[split.rest :]
