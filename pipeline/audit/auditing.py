"""Audits a finished run: sample, replay through the baseline, judge, write. Changes no answer.

```
 committed parts ─► choose rows ─► tokenise those rows again ─► baseline ─► verdict ─► audit/
```

Everything is taken from the run directory and the input it names; if input, tokenizer or model are
not the ones of the run any more, the audit is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.audit.document_order import in_order_of_run
from pipeline.audit.evidence import NO_EVIDENCE
from pipeline.audit.gate import seed_of_output
from pipeline.audit.reopened_job import check_same, reopen_job
from pipeline.audit.replay import BARS, AuditInput, RowAudit, Tier, audit_row
from pipeline.audit.sample import candidate_rows, choose_rows
from pipeline.audit.similarity import Encoder
from pipeline.audit.verdict import GroupCoverage, Verdict, audit_frame, describe_similarity, judge
from pipeline.engine.base import Baseline, Deviation, EngineCapabilities
from pipeline.errors import RunDirectoryError, UsageError
from pipeline.job.calibration import reused_documents
from pipeline.job.device_lock import holding_device
from pipeline.job.job import Job
from pipeline.job.noise_names import noise_name
from pipeline.job.observer import Observer, SilentObserver
from pipeline.job.planning import select_rows
from pipeline.job.stopping import interruptible
from pipeline.location import Location
from pipeline.plan.plan import noise_key
from pipeline.settings import AuditSettings, JobSettings, ModelSettings
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import reading_run
from pipeline.storage.summaries import AUDIT_SUMMARY

if TYPE_CHECKING:
    from pipeline.audit.other_arms import Arms
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.verify.segment_baseline import SegmentBaselines
    from pipeline.model.model import LoadedModel

_ANSWER_COLUMNS = ("row_index", "generated_text", "completion_token_ids")
_SAY_EVERY_S = 30.0
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
    chosen = _with_answers(directory, _choose(job, candidates, settings, seed, encoder))
    is_moved = job.reuse is not None and reused_documents(directory)
    way = "their documents' mode of reuse, slowly" if is_moved else "plain full prefill"
    observer.say(f"auditing {len(chosen)} of {len(candidates)} rows against {way}")
    with holding_device(job.settings, observer):
        loaded, baseline = _load_baseline(job)
        segments = _segment_baselines(job, baseline) if is_moved else None
        tier = _tier(job.settings, loaded)
        inputs = _audit_inputs(job, directory, chosen, loaded)
        num_chosen = len(chosen)
        chosen, inputs = _replayable(ran, chosen, inputs, observer)
        replay_started = time.monotonic()
        free = _free_rows(inputs, settings, seed)
        audits = _replay(baseline, segments, inputs, tier, free, observer)
        seconds = {"replay_seconds": time.monotonic() - replay_started}
        similarity = _similarity(job, encoder, chosen, inputs, audits)
        evidence, kl, attention = NO_EVIDENCE, dict[int, float](), dict[int, Deviation]()
        if settings.audit_arms and inputs and ran.computes_once:
            observer.say(f"computing up to {settings.audit_arms} of them in other ways as well")
            arms = _make_arms(job, loaded, baseline, tier, segments)
            some = np.random.default_rng(seed).permutation(len(inputs))[: settings.audit_arms]
            evidence = arms.gather(inputs, chosen["group_id"].to_list(), some.tolist())
            kl, attention = arms.kl, arms.attention
    verdict = judge(audits, GroupCoverage.of(candidates, chosen), tier, settings, evidence)
    directory.write_frame(
        "audit/audit.parquet", audit_frame(chosen, audits, similarity, kl, attention)
    )
    seconds["seconds"] = time.monotonic() - started
    described = describe_similarity(
        None if encoder is None else encoder.name, list(similarity.values())
    )
    asked = {
        "bar": settings.model_dump(exclude={"audit_encoder"}),  # which only describes
        "rows_auditable": len(candidates),
        "rows_left_out": num_chosen - len(chosen),
    }
    directory.write_json(AUDIT_SUMMARY.name, verdict.to_json(seed, described) | asked | seconds)
    return verdict


def _tier(settings: JobSettings, loaded: LoadedModel) -> Tier:
    if settings.model.weights == "int8":
        return "int8"
    if str(loaded.model.dtype) != "torch.float32":
        return "16-bit"
    return "strict" if settings.engine.fidelity == "strict" else "exact"


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


def _load_baseline(job: Job) -> tuple[LoadedModel, NaiveEngine]:
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.threads import use_threads
    from pipeline.model.model import load_model

    use_threads(job.settings.engine)
    loaded = load_model(job.settings.model)
    return loaded, NaiveEngine(loaded, settings=job.settings.engine)


def _make_arms(
    job: Job,
    loaded: LoadedModel,
    baseline: Baseline,
    tier: Tier,
    segments: SegmentBaselines | None,
) -> Arms:
    from pipeline.audit.other_arms import Arms  # brings the whole engine

    unrounded = _load_unrounded(job.settings.model)
    return Arms(loaded, baseline, job.settings.engine, tier, unrounded, segments)


def _segment_baselines(job: Job, naive: NaiveEngine) -> SegmentBaselines:
    """Of the mode in which the run reused documents."""
    from pipeline.engine.verify.segment_baseline import SegmentBaselines

    assert job.reuse is not None
    soft_rows = None if job.adapter is None else job.adapter.rows
    return SegmentBaselines(naive, job.reuse, soft_rows)


def _with_answers(directory: RunDirectory, chosen: pl.DataFrame) -> pl.DataFrame:
    """The chosen rows, by `row_index`, and what the committed parts say to them."""
    wanted = pl.col("row_index").is_in(chosen["row_index"].to_list())
    answers = directory.scan().filter(wanted).select(_ANSWER_COLUMNS).collect()
    return chosen.join(answers, on="row_index").sort("row_index")


def _load_unrounded(settings: ModelSettings) -> LoadedModel | None:
    """The model as it was saved, where the run held its weights otherwise."""
    from pipeline.model.model import load_model

    if settings.weights == "auto":
        return None
    return load_model(settings.model_copy(update={"weights": "auto"}))


def _audit_inputs(
    job: Job, directory: RunDirectory, chosen: pl.DataFrame, loaded: LoadedModel
) -> list[AuditInput]:
    """Row by row; prompt ids are made anew from the input."""
    rows = chosen["row_index"].to_list()
    batch = select_rows(job, rows)
    prepared = job.preparation().prepare(batch)
    prompts = np.split(prepared.flat, np.cumsum(prepared.lengths)[:-1])
    if job.settings.reuse.document_order == "best":
        prompts = in_order_of_run(directory, rows, prompts, prepared.segments)
    inputs: list[AuditInput] = []
    for answer, row_id, prompt, params in zip(
        chosen.iter_rows(named=True), batch.ids, prompts, prepared.params, strict=True
    ):
        name = noise_name(job.source.columns, row_id, answer["row_index"], prompt)
        row = AuditInput(
            row_index=answer["row_index"],
            prompt=prompt.tolist(),
            output=answer["completion_token_ids"],
            params=params,
            finish_reason=answer["finish_reason"],
            noise_key=0 if params.is_greedy else noise_key(params.seed, name),
            eos_token_ids=frozenset(loaded.shape.eos_token_ids),
            is_stopped=job.tokenizer.answers.is_stopped,
            lengths=tuple(prepared.segments.get(len(inputs), ())),
        )
        inputs.append(row)
    return inputs


def _replayable(
    ran: EngineCapabilities, chosen: pl.DataFrame, inputs: list[AuditInput], observer: Observer
) -> tuple[pl.DataFrame, list[AuditInput]]:
    """Those rows whose answer follows from prompt and parameters alone. Raises UsageError."""
    if ran.replays_noise:
        return chosen, inputs
    greedy = [row for row in inputs if row.params.is_greedy]
    if inputs and not greedy:
        raise UsageError(
            "the engine drew every audited answer with noise of its own, which nothing can replay; "
            "run some rows with temperature 0 to have something to compare"
        )
    if len(greedy) < len(inputs):
        left_out = len(inputs) - len(greedy)
        observer.say(f"{left_out} of them are left out: the engine drew them with noise of its own")
    rows = [row.row_index for row in greedy]
    return chosen.filter(pl.col("row_index").is_in(rows)), greedy


def _free_rows(inputs: list[AuditInput], settings: AuditSettings, seed: int) -> set[int]:
    """Positions of the greedy rows that the baseline generates on its own as well."""
    greedy = [i for i, row in enumerate(inputs) if row.params.is_greedy]
    shuffled = np.random.default_rng(seed).permutation(greedy)
    return set(shuffled[: settings.audit_free_running].tolist())


def _replay(
    plain: Baseline,
    segments: SegmentBaselines | None,
    inputs: list[AuditInput],
    tier: Tier,
    free: set[int],
    observer: Observer,
) -> list[RowAudit]:
    audits = []
    said_at = time.monotonic()
    for index, row in enumerate(inputs):
        baseline = plain if segments is None else segments.of(row.lengths)
        audits.append(audit_row(baseline, row, BARS[tier], free_run=index in free))
        if time.monotonic() - said_at > _SAY_EVERY_S:
            said_at = time.monotonic()
            observer.say(f"{index + 1}/{len(inputs)} rows audited")
    return audits


def _similarity(
    job: Job,
    encoder: Encoder | None,
    chosen: pl.DataFrame,
    inputs: list[AuditInput],
    audits: list[RowAudit],
) -> dict[int, float]:
    """Cosine of our text and the baseline's, of its free run if there is one, by `row_index`."""
    if encoder is None or not audits:
        return {}
    said = [a.baseline_ids if a.free_run is None else a.free_run.token_ids for a in audits]
    texts = job.tokenizer.answers.decode(
        [row.prompt for row in inputs], said, [row.params.stop for row in inputs]
    )
    cosines = encoder.cosine(chosen["generated_text"].to_list(), texts)
    return {a.row_index: float(c) for a, c in zip(audits, cosines, strict=True)}


def describe_audit(run: Location) -> dict[str, Any]:
    """The content of `audit/summary.json`. Raises RunDirectoryError if there was no audit."""
    with reading_run(run, parts=False) as directory:
        summary = AUDIT_SUMMARY.read(directory.root)
    if summary is None:
        raise RunDirectoryError(f"{run} was not audited yet; run: coppice audit {run}")
    return summary
