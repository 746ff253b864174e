"""What answers say that must be JSON, as values of a column. Knows no device and no files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeline.constraints import schema_of
from pipeline.job.planning import PlannedJob
from pipeline.plan.openings import last_place
from pipeline.records import Completion
from pipeline.tokens.tokenizer import PromptTokenizer


def guided_columns(planned: PlannedJob, completion: Completion, text: str) -> dict[str, Any]:
    """Of a row with an answer; nothing where no row says what its answer must be."""
    if not planned.columns.is_guided:
        return {}
    columns: dict[str, Any] = {"forced_tokens": completion.forced_tokens}
    if planned.parsed is None:
        return columns
    return columns | {"parsed": _parsed(planned, completion, text)}


def _parsed(planned: PlannedJob, completion: Completion, text: str) -> Any:
    """None where the answer was cut, or need not be JSON."""
    constraint = planned.plan.params_of(completion.sequence, completion.turn).constraint
    if completion.finish_reason != "stop" or schema_of(constraint) is None:
        return None
    assert planned.parsed is not None
    try:
        said = json.loads(behind_thinking(planned.job.tokenizer, completion.token_ids, text))
        return planned.parsed.convert(said)
    except (ValueError, OverflowError, RecursionError):
        return None  # a stop string ended it, or it is a number that no column holds


def behind_thinking(tokenizer: PromptTokenizer, token_ids: Sequence[int], text: str) -> str:
    """Of the text of an answer what comes behind its thinking, where there is any."""
    tags = tokenizer.grammars.tags
    if tags is None:
        return text
    at = last_place(token_ids, tags.end_ids)
    return text if at < 0 else tokenizer.decode_batch([token_ids[at + len(tags.end_ids) :]])[0]
