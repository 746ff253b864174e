"""Audits a finished run: sample, replay through the baseline, judge, write. Changes no answer.

```
 committed parts ─► choose rows ─► tokenise those rows again ─► baseline ─► verdict ─► audit/
```

Everything is taken from the run directory and the input it names; if input, tokenizer or model are
not the ones of the run any more, the audit is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.audit.answer_schemas import hold_to_schemas
from pipeline.audit.answer_texts import cosine_of_rows
from pipeline.audit.audit_inputs import audit_inputs
from pipeline.audit.baselines import (
    judging,
    load_baseline,
    make_arms,
    mode_baselines,
    tier_of,
    way_of,
)
from pipeline.audit.constraint_faults import plant_constraint_faults
from pipeline.audit.evidence import NO_EVIDENCE, Evidence
from pipeline.audit.gate import seed_of_output
from pipeline.audit.logprobs import check_logprobs
from pipeline.audit.reopened_job import check_same, reopen_job
from pipeline.audit.replay import RowAudit, Tier
from pipeline.audit.replays import free_rows, replay_rows, replayable
from pipeline.audit.sample import candidate_rows, choose_rows
from pipeline.audit.samples import read_answers
from pipeline.audit.score_rows import SCORE_BARS, describe_scores
from pipeline.audit.scored_audit import SCORE_COLUMNS, audit_scored, plant_faults, scored_inputs
from pipeline.audit.similarity import Encoder
from pipeline.audit.verdict import GroupCoverage, Verdict, audit_frame, describe_similarity, judge
from pipeline.engine.base import Deviation, EngineCapabilities
from pipeline.errors import RunDirectoryError, UsageError
from pipeline.job.device_lock import holding_device
from pipeline.job.job import Job
from pipeline.job.observer import Observer, SilentObserver
from pipeline.job.reading import select_rows
from pipeline.job.stopping import interruptible
from pipeline.location import Location
from pipeline.settings import AuditSettings
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import reading_run
from pipeline.storage.summaries import AUDIT_SUMMARY

_EMBEDDED_CHARACTERS = 400


@interruptible()
def audit_run(run: Location, settings: AuditSettings, observer: Observer | None = None) -> Verdict:
    """Audit the committed rows of `run`; writes `audit/audit.parquet` and `summary.json`.

    Its store reaches the input, too, over what run.json says of it: secrets are not there.

    A failed audit is a result, not an error. Raises UsageError where there is nothing to compare,
    InputError or ModelError where input or model have changed since the run, StorageError where
    the answers have.
    """
    with reading_run(run) as directory:
        return _audit(directory, lambda: reopen_job(directory, run.store), settings, observer)


@interruptible()
def audit_opened(
    job: Job, run: Location, settings: AuditSettings, observer: Observer | None = None
) -> Verdict:
    """As `audit_run`, where the job of the run is opened already."""
    with reading_run(run) as directory:
        return _audit(directory, lambda: check_same(job, directory), settings, observer)


def _audit(
    directory: RunDirectory,
    open: Callable[[], Job],
    settings: AuditSettings,
    observer: Observer | None,
) -> Verdict:
    started, observer = time.monotonic(), observer or SilentObserver()
    Encoder.check(settings.audit_encoder)
    job = open()
    if job.settings.model.engine == "echo":
        raise UsageError("the echo engine has no model to compare with; run with --engine prefix")
    directory.check_complete()  # a verdict holds for all rows, as they were committed
    ran = EngineCapabilities.recorded(directory.read_manifest().get("engine", {}))
    candidates = candidate_rows(directory.scan())
    if candidates.is_empty():
        raise UsageError(
            f"no row of {directory.name} was answered, so there is nothing to audit; "
            "failed.parquet in it says why"
        )
    encoder = Encoder.load(settings.audit_encoder)
    seed = seed_of_output(directory)
    further = (*SCORE_COLUMNS, *(n for one in job.source.columns.questions for n in one.columns))
    chosen = read_answers(
        directory,
        _choose(job, candidates, settings, seed, encoder),
        (further, ("parsed", "forced_tokens")),
        seed,
    )
    asked = _Asked(job, directory, settings, ran, seed, encoder, observer)
    has_scores = job.source.columns.has_scores
    way = "plain full prefill" if has_scores else way_of(job, directory)
    observer.say(f"auditing {len(chosen)} of {len(candidates)} rows against {way}")
    with holding_device(job.settings, observer):
        found = _look_at_scores(asked, chosen) if has_scores else _look_at_answers(asked, chosen)
    groups = GroupCoverage.of(candidates, found.chosen)
    verdict = judge(found.audits, groups, found.tier, settings, found.evidence)
    frame = audit_frame(found.chosen, found.audits, found.similarity, found.kl, found.attention)
    if found.chosen["sample"].sum():  # else each row's first one, or its only one, was looked at
        frame = frame.join(found.chosen.select("row_index", audit_sample="sample"), on="row_index")
    directory.write_frame("audit/audit.parquet", frame)
    described = describe_similarity(
        None if encoder is None else encoder.name, list(found.similarity.values())
    )
    said = {
        "bar": settings.model_dump(exclude={"audit_encoder"}),  # which only describes
        "rows_auditable": len(candidates),
        "rows_left_out": len(chosen) - len(found.chosen),
        "replay_seconds": found.replay_seconds,
        "seconds": time.monotonic() - started,
        **found.described,
    }
    directory.write_json(AUDIT_SUMMARY.name, verdict.to_json(seed, described) | said)
    return verdict


class _Asked(NamedTuple):
    """An audit of a run that is open."""

    job: Job
    directory: RunDirectory
    settings: AuditSettings
    ran: EngineCapabilities
    seed: int
    encoder: Encoder | None
    observer: Observer


@dataclass(frozen=True)
class _Found:
    """What it found in the `chosen` rows that it could replay."""

    chosen: pl.DataFrame
    audits: list[RowAudit]
    tier: Tier
    evidence: Evidence
    replay_seconds: float
    similarity: Mapping[int, float] = field(default_factory=dict)
    kl: Mapping[int, float] = field(default_factory=dict)
    attention: Mapping[int, Deviation] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)


def _look_at_answers(asked: _Asked, chosen: pl.DataFrame) -> _Found:
    job, directory, settings, ran, seed, encoder, observer = asked
    loaded, baseline = load_baseline(job)
    modes = mode_baselines(job, directory, baseline)
    judge = judging(baseline, modes)
    tier = tier_of(job.settings, loaded)
    inputs = audit_inputs(job, directory, chosen, loaded)
    chosen, inputs = replayable(ran, chosen, inputs, observer)
    replay_started = time.monotonic()
    free = free_rows(inputs, settings, seed)
    audits = replay_rows(judge, inputs, tier, free, observer)
    seconds = time.monotonic() - replay_started
    audits = hold_to_schemas(job, chosen, inputs, audits, observer.say)
    texts = chosen["generated_text"].to_list()
    similarity = cosine_of_rows(job, encoder, texts, inputs, audits)
    evidence, kl, attention = NO_EVIDENCE, dict[int, float](), dict[int, Deviation]()
    if settings.audit_arms and inputs and ran.computes_once:
        observer.say(f"computing up to {settings.audit_arms} of them in other ways as well")
        arms = make_arms(job, loaded, baseline, tier, modes)
        some = np.random.default_rng(seed).permutation(len(inputs))[: settings.audit_arms].tolist()
        evidence = arms.gather(inputs, chosen["group_id"].to_list(), some)
        kl, attention = arms.kl, arms.attention
        planted = plant_constraint_faults(job, loaded, baseline, inputs, tier)
        evidence = replace(evidence, faults=[*evidence.faults, *planted])
    if "logprobs" in chosen.columns:
        said = zip(inputs, chosen["logprobs"].to_list(), strict=True)
        evidence = replace(evidence, logprobs=check_logprobs(judge, list(said)))
    return _Found(chosen, audits, tier, evidence, seconds, similarity, kl, attention)


def _look_at_scores(asked: _Asked, chosen: pl.DataFrame) -> _Found:
    """Rows of scores have no text, so nothing is similar and nothing runs freely."""
    job, settings, observer = asked.job, asked.settings, asked.observer
    loaded, baseline = load_baseline(job)
    tier, inputs = tier_of(job.settings, loaded), scored_inputs(job, chosen)
    started = time.monotonic()
    audits = audit_scored(baseline, inputs, tier, observer)
    seconds = time.monotonic() - started
    evidence = NO_EVIDENCE
    if settings.audit_arms and inputs and asked.ran.computes_once:
        from pipeline.engine.prefix_engine import PrefixEngine

        observer.say("planting faults in some of them")
        order = np.random.default_rng(asked.seed).permutation(len(inputs))
        some = [inputs[i] for i in order[: settings.audit_arms].tolist()]
        evidence = plant_faults(PrefixEngine(loaded, job.settings.engine), baseline, some, tier)
    bars = SCORE_BARS[tier]
    described = {
        "scores": describe_scores(audits),
        "near_tie_bar": bars.near_tie,
        "hard_bar": bars.hard,
    }
    rows = [found.audit for found in audits]
    return _Found(chosen, rows, tier, evidence, seconds, described=described)


def _choose(
    job: Job, candidates: pl.DataFrame, settings: AuditSettings, seed: int, encoder: Encoder | None
) -> pl.DataFrame:
    def embed(rows: Sequence[int]) -> NDArray[np.float32]:
        assert encoder is not None
        contents = select_rows(job, rows).contents
        texts = ["" if content is None else job.tokenizer.render(content) for content in contents]
        text_of = dict(zip(sorted(rows), texts, strict=True))
        # Beginnings are what rows share and an encoder reads a few hundred tokens, so the ends.
        return encoder.encode([text_of[row][-_EMBEDDED_CHARACTERS:] for row in rows])

    size = settings.num_rows(len(candidates))
    return choose_rows(candidates, size, seed, None if encoder is None else embed)


def describe_audit(run: Location) -> dict[str, Any]:
    """The content of `audit/summary.json`. Raises RunDirectoryError if there was no audit."""
    with reading_run(run, parts=False) as directory:
        summary = AUDIT_SUMMARY.read(directory.root)
    if summary is None:
        raise RunDirectoryError(f"{run} was not audited yet; run: coppice audit {run}")
    return summary
