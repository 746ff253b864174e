"""Faults of constraints, planted on purpose: an audit that lets one pass proves nothing.

| fault | what happens |
|---|---|
| mask | answers are decoded as if nothing had been ruled out |
| forced token | one of the tokens that had to follow is another one |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipeline.audit.evidence import PlantedFault
from pipeline.audit.replay import BARS, AuditInput, Tier, audit_row
from pipeline.job.job import Job
from pipeline.plan.plan import build_plan
from pipeline.plan.token_table import TokenTable

if TYPE_CHECKING:
    from pipeline.engine.base import Baseline
    from pipeline.model.model import LoadedModel

_ROWS: Final = 4
_TOKENS: Final = 16
_PLAIN: Final[dict[str, Any]] = {
    "temperature": 0.0, "max_new_tokens": _TOKENS, "stop": (), "rules": "", "asked": "", "n": 1,
    "logprobs": None,
}  # fmt: skip
"""One greedy answer that nothing but its form decides."""


def plant_constraint_faults(
    job: Job, loaded: LoadedModel, baseline: Baseline, inputs: Sequence[AuditInput], tier: Tier
) -> list[PlantedFault]:
    """In some of the rows whose answers had to be something; none where there are none."""
    some = [row for row in inputs if row.params.constraint and row.story is None][:_ROWS]
    if not some:
        return []
    clean = _write(job, loaded, some)
    free = _write(job, loaded, [
        replace(row, params=replace(row.params, constraint="", thinking_budget=None))
        for row in some
    ])  # fmt: skip
    spoilt = {
        "mask": [replace(row, output=other.output) for row, other in zip(clean, free, strict=True)],
        "forced token": [_with_wrong_token(job, row) for row in clean],
    }
    found = []
    for fault, rows in spoilt.items():
        changed = any(a.output != b.output for a, b in zip(rows, clean, strict=True))
        passed = all(
            row.output
            and audit_row(baseline, row, BARS[tier]).row_class in ("identical", "near_tie")
            for row in rows
        )
        found.append(PlantedFault(fault, 0, changed, not passed))
    return found


def _write(job: Job, loaded: LoadedModel, rows: Sequence[AuditInput]) -> list[AuditInput]:
    """The rows with what the engine answers to them, greedily."""
    from pipeline.engine.base import RunControl
    from pipeline.engine.guides import over_at
    from pipeline.engine.prefix_engine import PrefixEngine

    params = tuple(replace(row.params, seed=i, **_PLAIN) for i, row in enumerate(rows))
    indices = np.arange(len(rows))
    prompts = [list(row.prompt) for row in rows]
    table = TokenTable.from_lists(prompts, loaded.shape.vocabulary_size)
    plan = build_plan(table, [str(i) for i in indices], params, indices)
    engine, grammars = PrefixEngine(loaded, job.settings.engine), job.tokenizer.grammars
    control = RunControl(grammars=grammars)
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), control))
    written = list(rows)
    for completion in done:
        at = int(plan.sequences.row[completion.sequence])
        row, output = rows[at], completion.token_ids
        over = over_at(grammars, params[at], row.prompt, output, row.eos_token_ids)
        written[at] = replace(
            row, output=output, params=params[at], finish_reason=completion.finish_reason,
            over_at=over,
        )  # fmt: skip
    return written


def _with_wrong_token(job: Job, row: AuditInput) -> AuditInput:
    """One of the forced tokens of its beginning is the one after it; the row as it is where there
    is none."""
    opening = job.tokenizer.grammars.opening(row.params.constraint)
    at = min(len(opening), len(row.output)) // 2
    if not opening or not row.output or at >= len(row.output):
        return row
    wrong = (row.output[at] + 1) % job.tokenizer.vocabulary_size
    return replace(row, output=(*row.output[:at], wrong, *row.output[at + 1 :]))
