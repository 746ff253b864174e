"""What answers say that must be JSON, as values of a column. Knows no device and no files."""

from __future__ import annotations

import json
from typing import Any

from pipeline.constraints import schema_of
from pipeline.job.answer_texts import Said, split_of
from pipeline.job.job import Job
from pipeline.job.planning import PlannedJob
from pipeline.records import Completion
from pipeline.request_rules import read_asked
from pipeline.storage.schema_types import Form


def guided_columns(
    planned: PlannedJob, completion: Completion, said: Said, text: str
) -> dict[str, Any]:
    """Of a row with an answer, where some row says what its answer must be."""
    columns: dict[str, Any] = {"forced_tokens": completion.forced_tokens}
    if planned.parsed is None:
        return columns
    return columns | {"parsed": parsed_value(planned.job, planned.parsed, said, text)}


def parsed_value(job: Job, form: Form, said: Said, text: str) -> Any:
    """What an answer with this text says; None where it was cut, or need not be JSON."""
    if said.reason != "stop" or schema_of(said.params.constraint) is None:
        return None
    try:
        return form.convert(json.loads(form_text(job, said, text)))
    except (ValueError, OverflowError, RecursionError):
        return None  # a stop string ended it, or it is a number that no column holds


def form_text(job: Job, said: Said, text: str) -> str:
    """Of an answer with this text what its form is about: without what was thought before, and
    without control tokens that a row wants to see."""
    tags, rules = job.tokenizer.grammars.tags, read_asked(said.params.asked)
    split = None if tags is None else split_of(tags, said.prompt, said.token_ids, said.params)
    shows_more = rules.include_stop_str_in_output or not rules.skip_special_tokens
    if not shows_more and (split is None or job.reasoning is not None):
        return text
    ids = said.token_ids[0 if split is None else split.rest :]
    if ids and ids[-1] in rules.stop_token_ids and not rules.include_stop_str_in_output:
        ids = ids[:-1]
    return job.tokenizer.decode_batch([ids])[0]
