"""Answers that do not fit their JSON schemas are corrupt, and so are columns that say others.

A schema is a stranger's, and a pattern in it may take for ever, so it is looked at in a process of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import polars as pl

from pipeline.audit.answer_judge import DOES_NOT, make_judge
from pipeline.audit.replay import AuditInput, RowAudit
from pipeline.confined import Confined
from pipeline.constraints import schema_of
from pipeline.job.answer_texts import Said
from pipeline.job.job import Job
from pipeline.job.parsed import form_text, parsed_value
from pipeline.narrowed_schemas import narrowed
from pipeline.storage.schema_types import JSON_TEXT, form_of

_SECONDS: Final = 10.0  # for an answer


def hold_to_schemas(
    job: Job,
    chosen: pl.DataFrame,
    inputs: Sequence[AuditInput],
    audits: list[RowAudit],
    say: Callable[[str], None],
) -> list[RowAudit]:
    """The same audits; an answer that is complete and does not fit its schema is corrupt, and so is
    one whose column `parsed` says anything but the answer. `say`: takes what could not be seen."""
    wrong = _misfits(job, chosen, inputs, say)
    has_values = any(schema_of(row.params.constraint) is not None for row in inputs)
    if has_values and "parsed" in chosen.columns:  # else it is one that the input brought
        wrong |= _misread(job, chosen, inputs)
    return [
        replace(audit, row_class="corrupt") if row.row_index in wrong else audit
        for row, audit in zip(inputs, audits, strict=True)
    ]


def _misfits(
    job: Job, chosen: pl.DataFrame, inputs: Sequence[AuditInput], say: Callable[[str], None]
) -> set[int]:
    """The rows whose answers do not fit."""
    whole = {
        row.row_index: (form_text(job, _said(row), text or ""), row.params.constraint)
        for row, text in zip(inputs, chosen["generated_text"], strict=True)
        if row.finish_reason == "stop"
        and not row.params.stop
        and schema_of(row.params.constraint) is not None
    }
    if not whole:
        return set()
    said = Confined(make_judge, (), _SECONDS).map(list(whole.values()))
    unknown = sum(not isinstance(answer, str) for answer in said)
    if unknown:
        say(f"{unknown} answers could not be held to their schemas, which take too long or are odd")
    return {row for row, answer in zip(whole, said, strict=True) if answer == DOES_NOT}


def _misread(job: Job, chosen: pl.DataFrame, inputs: Sequence[AuditInput]) -> set[int]:
    """The rows whose `parsed` is another value than the answer's."""
    asked = job.settings.sampling.constraint
    own = schema_of(asked)
    typed = None if own is None else form_of(narrowed(own))
    found = set()
    for row, text, parsed in zip(
        inputs, chosen["generated_text"], chosen["parsed"].to_list(), strict=True
    ):
        is_own = typed is not None and row.params.constraint == asked
        forms = [JSON_TEXT, typed] if is_own else [JSON_TEXT]  # by what the other rows ask for
        meant = [f.kept(parsed_value(job, f, _said(row), text or "")) for f in forms if f]
        if parsed not in meant:
            found.add(row.row_index)
    return found


def _said(row: AuditInput) -> Said:
    return Said(row.prompt, tuple(row.output), row.finish_reason, row.params)
