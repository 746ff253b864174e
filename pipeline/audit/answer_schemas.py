"""Whether answers fit their JSON schemas, by a validator that shares nothing with the masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from pipeline.audit.replay import AuditInput, RowAudit
from pipeline.constraints import schema_of
from pipeline.job.job import Job
from pipeline.job.parsed import behind_thinking


def hold_to_schemas(
    job: Job, chosen: pl.DataFrame, inputs: Sequence[AuditInput], audits: list[RowAudit]
) -> list[RowAudit]:
    """The same audits; a complete answer that does not fit its schema, or that the column `parsed`
    does not hold, is corrupt."""
    texts = dict(zip(chosen["row_index"], chosen["generated_text"], strict=True))
    parsed = {}
    if "parsed" in chosen.columns:
        parsed = dict(zip(chosen["row_index"], chosen["parsed"], strict=True))
    found = []
    for row, audit in zip(inputs, audits, strict=True):
        is_whole = row.finish_reason == "stop" and not row.params.stop
        if is_whole and schema_of(row.params.constraint) is not None:
            text = behind_thinking(job.tokenizer, row.output, texts[row.row_index] or "")
            if not fits(text, row.params.constraint) or parsed.get(row.row_index, "") is None:
                audit = replace(audit, row_class="corrupt")
        found.append(audit)
    return found


def fits(text: str, constraint: str) -> bool:
    """Whether a text is JSON that fits the schema of a constraint."""
    from jsonschema import Draft202012Validator

    schema = schema_of(constraint)
    assert schema is not None
    try:
        return bool(Draft202012Validator(schema).is_valid(json.loads(text)))
    except (ValueError, RecursionError):
        return False
