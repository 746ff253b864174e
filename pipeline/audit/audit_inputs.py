"""Written rows as what a baseline is given: prompts made anew from the input, answers as committed.

Knows neither baselines nor bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from pipeline.audit.document_order import in_order_of_run
from pipeline.audit.histories import Histories
from pipeline.audit.replay import AuditInput
from pipeline.job.job import Job
from pipeline.job.noise_names import noise_name
from pipeline.job.reading import select_rows
from pipeline.plan.plan import noise_key
from pipeline.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.model.model import LoadedModel


def audit_inputs(
    job: Job, directory: RunDirectory, chosen: pl.DataFrame, loaded: LoadedModel
) -> list[AuditInput]:
    """Row by row; prompt ids are made anew from the input, those of turns with what was said
    before them."""
    from pipeline.engine.guides import over_at  # brings torch

    histories = Histories(job, directory, chosen["row_index"].to_list())
    batch = select_rows(job, histories.rows)
    prepared = job.preparation().prepare(batch)
    if job.settings.reuse.document_order == "best":
        prepared = in_order_of_run(directory, histories.rows, prepared)
    prompts = prepared.prompts
    place = {row: place for place, row in enumerate(histories.rows)}
    added = dict(zip(histories.rows, prompts, strict=True))
    params_of = dict(zip(histories.rows, prepared.params, strict=True))
    system_tokens = {histories.rows[at]: count for at, count in prepared.system_tokens.items()}
    eos = frozenset(loaded.shape.eos_token_ids)
    inputs: list[AuditInput] = []
    for answer in chosen.iter_rows(named=True):
        at = place[answer["row_index"]]
        name = noise_name(job.source.columns, batch.ids[at], answer["row_index"], prompts[at])
        prompt = histories.prompt(answer["row_index"], added)
        params = histories.fit(prepared.params[at], len(prompt))
        prompt = prompt[: len(prompt) - len(params.opening)]
        lengths = _without_opening(prepared.segments.get(at, ()), len(params.opening))
        params = params.without_opening()
        output = answer["completion_token_ids"]
        row = AuditInput(
            row_index=answer["row_index"],
            prompt=prompt.tolist(),
            output=output,
            params=params,
            finish_reason=answer["finish_reason"],
            noise_key=0 if params.is_greedy else noise_key(params.seed, name, answer["sample"]),
            eos_token_ids=eos,
            is_stopped=job.tokenizer.answers.is_stopped,
            lengths=lengths,
            story=histories.story(answer["row_index"], output, added, params_of, system_tokens),
            over_at=over_at(job.tokenizer.grammars, params, prompt.tolist(), output, eos),
        )
        inputs.append(row)
    return inputs


def _without_opening(lengths: Sequence[int], opening: int) -> tuple[int, ...]:
    """Of segments, the last of which ends with the forced opening of the answer."""
    return (*lengths[:-1], lengths[-1] - opening) if lengths else ()
