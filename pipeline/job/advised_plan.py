"""A plan with what a person wants to know before a run: advice, warnings, the time it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.costs import cost_of
from pipeline.job.advice import SAMPLE_CHARACTERS, SAMPLE_ROWS, advise
from pipeline.job.document_ordering import count_distinct_tokens, order_documents
from pipeline.job.document_ordering import memory_needed as ordering_memory
from pipeline.job.field_ordering import memory_needed, order_fields
from pipeline.job.job import Job
from pipeline.job.planning import PlannedJob, plan_rows
from pipeline.job.reading import Watch, ignore
from pipeline.job.row_faults import call_by_halves
from pipeline.model.rates import recall_rates
from pipeline.plan.conversation_figures import gives_way
from pipeline.plan.document_planning import plan_documents
from pipeline.plan.documents import Reuse


def plan_for_a_person(job: Job, keep_rows: bool = False, watch: Watch = ignore) -> PlannedJob:
    """As `plan_rows`, with what a person wants to know before a run: advice and estimated time."""
    planned = plan_rows(job, keep_rows, watch)
    prompts = sample_prompts(planned)
    summary, advice = planned.summary, advise(prompts)
    fields, memory = job.fields, job.settings.plan.plan_memory
    if fields is None and job.source.fields and memory_needed(job.source) <= memory:
        _, fields = order_fields(job.source, memory, is_applied=False)
    rates = None if job.shape is None else recall_rates(job.settings.model, job.model_identity)
    estimate = (
        None if rates is None else rates.estimate(summary.unique_tokens, summary.max_new_tokens)
    )
    conversations = summary.conversations
    if conversations is not None and rates is not None and rates.saves_from is not None:
        conversations = conversations | {"giving_way": gives_way(rates.saves_from)}
    summary = replace(
        summary,
        conversations=conversations,
        cost=_cost(planned, estimate),
        advice=None if advice is None else advice.to_json(),
        warning=job.tokenizer.looks_rendered(prompts),
        fields=None if fields is None else fields.to_json(),
        documents=_all_figures(planned),
        estimate=estimate,
    )
    return replace(planned, summary=summary)


def _cost(planned: PlannedJob, estimate: dict[str, Any] | None) -> dict[str, Any] | None:
    """At most, if answers are as long as they may be; None: nobody asks for it."""
    summary, seconds, saved_s = planned.summary, None, None
    if estimate is not None:
        seconds = estimate["prefill_s"] + estimate["decode_s"]
        again = max(0, summary.prompt_tokens - summary.unique_tokens)
        saved_s = estimate["prefill_s"] / max(1, summary.unique_tokens) * again
    cost = cost_of(planned.job.settings.cost, seconds, summary.rows, saved_s)
    return None if cost is None else cost.to_json()


def _all_figures(planned: PlannedJob) -> dict[str, Any] | None:
    """Of documents, with what the other ways would compute. None: there are none."""
    job, plan, segments, tenant = planned.job, planned.plan, planned.segments, planned.tenant_of_row
    if segments is None or planned.figures is None:
        return None
    in_plan = plan.tree.unique_tokens
    best_order: int | None = in_plan
    if planned.ordered is None:
        given_order, best_order = in_plan, None
        if ordering_memory(segments) <= job.settings.plan.plan_memory:
            best = order_documents(plan.table, segments, tenant).table
            best_order = count_distinct_tokens(best, tenant)
    else:
        given_order = count_distinct_tokens(planned.ordered.given, tenant)
    concat = Reuse("concat", job.tokenizer.vocabulary_size)
    anywhere = plan_documents(plan.table, plan.sequences.row, segments, concat, tenant)
    return replace(
        planned.figures,
        in_given_order=given_order,
        in_best_order=best_order,
        at_any_position=anywhere.tokens_to_compute(np.arange(len(plan.sequences))),
    ).to_json()


def warn_of(planned: PlannedJob) -> list[str]:
    """What a person should know of a few prompts before a run: a sentence, or nothing."""
    warning = planned.job.tokenizer.looks_rendered(sample_prompts(planned, 64, 64))
    return [*([warning] if warning else []), *_warn_of_adapter(planned)]


def _warn_of_adapter(planned: PlannedJob) -> list[str]:
    """Where documents are unlike those that the adapter knows."""
    adapter, segments = planned.job.adapter, planned.segments
    if adapter is None or segments is None:
        return []
    are_documents = segments.are_documents(planned.plan.sequences.row)
    return adapter.warnings(segments.lengths[are_documents])


def sample_prompts(
    planned: PlannedJob, num_rows: int = SAMPLE_ROWS, num_tokens: int = SAMPLE_CHARACTERS
) -> list[str]:
    """Beginnings of some prompts, evenly spaced, as their token ids spell them."""
    table, rows = planned.plan.table, planned.plan.whole_rows
    some = rows[:: max(1, -(-len(rows) // num_rows))].tolist()
    ids = [table[row][:num_tokens].tolist() for row in some if table.lengths[row]]
    decoded = call_by_halves(planned.job.tokenizer.decode_batch, ids)
    return [
        text[:SAMPLE_CHARACTERS]
        for _, texts in decoded
        if not isinstance(texts, BaseException)  # of which no advice is given
        for text in texts
    ]
