"""Audits rows of scores: reads what was written, asks the baseline, plants faults."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipeline.audit.evidence import Evidence, PlantedFault
from pipeline.audit.replay import Tier
from pipeline.audit.score_rows import (
    SCORE_BARS,
    Part,
    Request,
    ScoreAudit,
    ScoredInput,
    audit_scores,
    joined,
)
from pipeline.job.job import Job
from pipeline.job.observer import Observer
from pipeline.job.prepared_batch import PreparedBatch
from pipeline.job.question_answers import answer_columns
from pipeline.job.reading import select_rows
from pipeline.job.row_scores import compare
from pipeline.questions import Question

if TYPE_CHECKING:
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.prefix_engine import PrefixEngine

SCORE_COLUMNS = ("loglikelihoods", "greedy", "token_counts", "byte_counts", "choice_index")
_SAY_EVERY_S = 30.0
_FAULT_ROWS = 4
_FAULT_REQUESTS = 8  # of a row
_ALONE_REQUESTS = 16


def scored_inputs(job: Job, chosen: pl.DataFrame) -> list[ScoredInput]:
    """Row by row, by `row_index`; requests are made anew from the input."""
    rows = chosen["row_index"].to_list()
    batch, preparation = select_rows(job, rows), job.preparation()
    requests: list[list[Request]] = []
    for part in preparation.parts(batch):
        requests += _requests(preparation.prepare(part))
    settings, questions = job.settings.scoring, job.source.columns.questions
    found = [
        ScoredInput(
            row_index=row["row_index"],
            requests=asked,
            loglikelihoods=row["loglikelihoods"],
            greedy=row["greedy"],
            token_counts=row["token_counts"],
            num_bytes=row["byte_counts"],
            choice_index=row["choice_index"],
            normalize=settings.normalize,
            is_one=settings.prompt_logprobs,
        )
        for row, asked in zip(chosen.iter_rows(named=True), requests, strict=True)
    ]
    if not questions:
        return found
    written = chosen.iter_rows(named=True)
    return [
        replace(row, asked=_parts(row, cells, questions))
        for row, cells in zip(found, written, strict=True)
    ]


def _parts(row: ScoredInput, cells: Mapping[str, Any], questions: Sequence[Question]) -> list[Part]:
    """Of a row that was asked questions, what `cells` say that it answered."""
    found, low = list[Part](), 0
    for question in questions:
        part = Part(question.name, low, low + len(question.labels), -1)
        low = part.high
        if part.high <= min(len(row.loglikelihoods), len(row.requests)):
            said = compare(row.scores(part, row.loglikelihoods), row.normalize)
            if said is not None and _is_written(answer_columns(question, said), cells):
                part = part._replace(chosen=said.best)
        found.append(part)
    return found


def _is_written(expected: Mapping[str, object], cells: Mapping[str, Any]) -> bool:
    return all(
        math.isclose(value, cells[name], rel_tol=1e-9)
        if isinstance(value, float) and isinstance(cells[name], float)
        else value == cells[name]
        for name, value in expected.items()
    )


def _requests(prepared: PreparedBatch) -> list[list[Request]]:
    asked = prepared.requests
    assert asked is not None
    bounds = np.append(0, np.cumsum(asked.counts)).tolist()
    contexts, behind = asked.pieces[::2], asked.pieces[1::2]
    pairs: list[Request] = [
        (context.tolist(), [*ids.tolist(), last])
        for context, ids, last in zip(contexts, behind, asked.last.tolist(), strict=True)
    ]
    return [pairs[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def audit_scored(
    baseline: NaiveEngine, inputs: Sequence[ScoredInput], tier: Tier, observer: Observer
) -> list[ScoreAudit]:
    """What the baseline says of each row, by full prefill of every request."""
    from pipeline.engine.naive_scores import likelihoods

    found, said_at = list[ScoreAudit](), time.monotonic()
    for index, row in enumerate(inputs):
        expected = joined(row, list(likelihoods(baseline.forced_logits, row.requests)))
        found.append(audit_scores(row, expected, SCORE_BARS[tier]))
        if time.monotonic() - said_at > _SAY_EVERY_S:
            said_at = time.monotonic()
            observer.say(f"{index + 1}/{len(inputs)} rows audited")
    return found


def plant_faults(
    engine: PrefixEngine, baseline: NaiveEngine, inputs: Sequence[ScoredInput], tier: Tier
) -> Evidence:
    """Whether faults planted in the engine are caught, and of strict mode whether its bits hold."""
    return Evidence(
        faults=_plant(engine, baseline, inputs, tier), same_bits=_same_bits(engine, inputs)
    )


def _plant(
    engine: PrefixEngine, baseline: NaiveEngine, inputs: Sequence[ScoredInput], tier: Tier
) -> list[PlantedFault]:
    """Each fault in a few rows, which go through the audit as any others."""
    from pipeline.engine.naive_scores import likelihoods
    from pipeline.engine.verify.score_faults import SCORE_FAULTS, score_with_fault

    longest = sorted(inputs, key=lambda row: -max(len(ids) for _, ids in row.requests))
    rows = [list(row.requests[:_FAULT_REQUESTS]) for row in longest[:_FAULT_ROWS]]
    expected = [list(likelihoods(baseline.forced_logits, row)) for row in rows]
    clean = score_with_fault(engine, rows, None)
    planted = []
    for fault in SCORE_FAULTS:
        changed = caught = False
        for row, said, before, written in zip(
            rows, expected, clean, score_with_fault(engine, rows, fault), strict=True
        ):
            values = [value for value, _ in written]
            counts = [len(ids) for _, ids in row]
            spoilt = ScoredInput(-1, row, values, [greedy for _, greedy in written], counts, None)
            moved = (
                abs(value - was) / np.sqrt(count) > SCORE_BARS[tier].near_tie
                for value, (was, _), count in zip(values, before, counts, strict=True)
            )
            changed |= any(moved)
            audit = audit_scores(spoilt, said, SCORE_BARS[tier]).audit
            caught |= audit.row_class not in ("identical", "near_tie")
        planted.append(PlantedFault(fault, 0, changed, caught))
    return planted


def _same_bits(engine: PrefixEngine, inputs: Sequence[ScoredInput]) -> list[bool]:
    """Of strict mode: whether rows have the bits that they have when each runs alone."""
    from pipeline.engine.verify.score_faults import score_with_fault

    if engine.settings.fidelity != "strict":
        return []
    same = []
    for row in inputs[:_ALONE_REQUESTS]:
        some = list(row.requests)[:_ALONE_REQUESTS]
        if row.is_one and len(some) < len(row.requests):
            continue
        (found,) = score_with_fault(engine, [some], None)
        values = [value for value, _ in found]
        written = list(row.loglikelihoods)[: len(values)]
        same.append(sum(values) == written[0] if row.is_one else values == written)
    return same
