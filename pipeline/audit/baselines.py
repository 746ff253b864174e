"""What an audit compares with: the model again, by plain full prefill or as the run's rule says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from pipeline.audit.replay import AuditInput, Tier
from pipeline.engine.base import Baseline
from pipeline.job.calibration import reused_documents
from pipeline.job.job import Job
from pipeline.settings import JobSettings, ModelSettings
from pipeline.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.audit.other_arms import Arms
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.verify.arms import ModeBaselines
    from pipeline.engine.verify.segment_baseline import SegmentBaseline
    from pipeline.engine.verify.stateful_baseline import EvictionBaseline
    from pipeline.model.model import LoadedModel

    RowBaseline: TypeAlias = NaiveEngine | SegmentBaseline | EvictionBaseline


def way_of(job: Job, directory: RunDirectory) -> str:
    """How answers are computed again, for a person."""
    if _moves(job, directory):
        return "their documents' mode of reuse, slowly"
    return "what their conversations kept, slowly" if _evicts(job) else "plain full prefill"


def tier_of(settings: JobSettings, loaded: LoadedModel) -> Tier:
    """By what its answers are judged."""
    if settings.model.weights == "int8":
        return "int8"
    if str(loaded.model.dtype) != "torch.float32":
        return "16-bit"
    return "strict" if settings.engine.fidelity == "strict" else "exact"


def load_baseline(job: Job) -> tuple[LoadedModel, NaiveEngine]:
    """Plain full prefill of the job's model."""
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.threads import use_threads
    from pipeline.model.model import load_model

    use_threads(job.settings.engine)
    loaded = load_model(job.settings.model)
    grammars = job.tokenizer.grammars
    return loaded, NaiveEngine(loaded, settings=job.settings.engine, grammars=grammars)


def mode_baselines(job: Job, directory: RunDirectory, naive: NaiveEngine) -> ModeBaselines | None:
    """Of the mode in which the run reused documents, or of what its conversations gave up; None:
    its rows are plain prompts."""
    if _moves(job, directory):
        from pipeline.engine.verify.segment_baseline import SegmentBaselines

        assert job.reuse is not None
        soft_rows = None if job.adapter is None else job.adapter.rows
        return SegmentBaselines(naive, job.reuse, soft_rows)
    if not _evicts(job):
        return None
    from pipeline.engine.verify.stateful_baseline import EvictionBaselines

    assert job.eviction is not None
    return EvictionBaselines(naive, job.eviction)


def judging(naive: NaiveEngine, modes: ModeBaselines | None) -> Callable[[AuditInput], RowBaseline]:
    """What a row is judged by: plain full prefill, or the rule of the run."""
    return (lambda row: naive) if modes is None else modes.of_row


def make_arms(
    job: Job,
    loaded: LoadedModel,
    baseline: Baseline,
    tier: Tier,
    modes: ModeBaselines | None,
) -> Arms:
    """The other ways in which some rows are computed."""
    from pipeline.audit.other_arms import Arms  # brings the whole engine

    unrounded = _load_unrounded(job.settings.model)
    return Arms(loaded, baseline, job.settings.engine, tier, unrounded, modes)


def _load_unrounded(settings: ModelSettings) -> LoadedModel | None:
    """The model as it was saved, where the run held its weights otherwise."""
    from pipeline.model.model import load_model

    if settings.weights == "auto":
        return None
    return load_model(settings.model_copy(update={"weights": "auto"}))


def _moves(job: Job, directory: RunDirectory) -> bool:
    return job.reuse is not None and reused_documents(directory)


def _evicts(job: Job) -> bool:
    return job.eviction is not None and job.eviction.evictor != "none"
