"""Makes the engine that the settings name. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.base import Engine
from pipeline.errors import EngineError, UsageError
from pipeline.settings import JobSettings

if TYPE_CHECKING:
    from pipeline.model.model import LoadedModel
    from pipeline.plan.conversations import Eviction
    from pipeline.plan.documents import Reuse


def make_engine(settings: JobSettings) -> Engine:
    """See `EngineFactory`. A model that fails the prefix engine's self-test gets the naive one,
    which says so. Raises UsageError also where strict mode cannot be had."""
    chosen = settings.model.engine
    check_strict(settings)
    if chosen == "echo":
        from pipeline.engine.echo_engine import EchoEngine

        return EchoEngine()
    if chosen == "vllm":
        from pipeline.engine.vllm_engine import VllmEngine

        return VllmEngine(settings.model, settings.engine)
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.threads import use_threads
    from pipeline.model.model import load_model

    use_threads(settings.engine)
    loaded = load_model(settings.model)
    if chosen == "prefix":
        reuse = _prepare_reuse(loaded, settings)
        return _tested(loaded, settings, reuse)
    return NaiveEngine(loaded, loaded.notes, settings.engine)


def check_strict(settings: JobSettings) -> None:
    """Raises UsageError where another engine than the one that can is asked to be strict."""
    if settings.engine.fidelity == "strict" and settings.model.engine != "prefix":
        raise UsageError(
            "--fidelity strict is a promise of the prefix engine alone; "
            f"leave it out with --engine {settings.model.engine}"
        )


def _prepare_reuse(loaded: LoadedModel, settings: JobSettings) -> Reuse | None:
    """How documents are reused, the model knowing the adapter's tokens. Raises ModelError."""
    from pipeline.engine.soft_rows import add_soft_rows
    from pipeline.model.adapter import adapter_of, reuse_of
    from pipeline.model.identity import identify_model

    if not settings.reuse.moves_documents:
        return None
    size, adapter = loaded.shape.vocabulary_size, None
    if settings.reuse.adapter is not None:  # to identify a model takes reading its files
        identity = identify_model(settings.model)
        adapter = adapter_of(settings.reuse, identity, loaded.shape.hidden_size)
    if adapter is not None:
        add_soft_rows(loaded.model, adapter.rows, size)
    return reuse_of(settings.reuse, size, adapter)


def _tested(loaded: LoadedModel, job: JobSettings, reuse: Reuse | None) -> Engine:
    """The prefix engine, or the naive one where the self-test shows that reuse is unsound.

    Raises UsageError where documents cannot be seen as `reuse` says, or tokens not given up as
    the job says.
    """
    from pipeline.engine.device_costs import device_costs
    from pipeline.engine.naive_engine import NaiveEngine
    from pipeline.engine.prefix_engine import PrefixEngine
    from pipeline.engine.verify.self_test import (
        eviction_self_test,
        segment_self_test,
        self_test,
    )
    from pipeline.engine.verify.strict_probe import strict_probe

    settings, evictor = job.engine, job.conversations.evict
    is_strict = settings.fidelity == "strict"
    engine = PrefixEngine(loaded, settings)
    try:
        worst = self_test(engine)
    except EngineError as error:
        if is_strict:
            raise UsageError(f"--fidelity strict: {error}; leave it out") from error
        if reuse is not None:  # the naive engine moves no document
            raise UsageError(f"{error}; choose --reuse prefix") from error
        if evictor != "none":  # and gives up nothing
            raise UsageError(f"{error}; choose --evict none") from error
        note = f"{error}; so each row is computed in full by the naive engine"
        return NaiveEngine(loaded, [*loaded.notes, note], settings)
    notes = [
        *loaded.notes,
        f"self-test passed: within {worst:.1e} of the model's own largest logit",
    ]
    if reuse is not None:
        try:
            worst = segment_self_test(engine, reuse)
        except EngineError as error:
            raise UsageError(f"{error}; choose --reuse prefix") from error
        notes.append(f"self-test of --reuse {reuse.mode} passed: within {worst:.1e} of its rule")
    if evictor != "none":
        try:
            worst = eviction_self_test(engine, _small_eviction(job))
        except EngineError as error:
            raise UsageError(f"{error}; choose --evict none") from error
        notes.append(f"self-test of --evict {evictor} passed: within {worst:.1e} of its rule")
    if is_strict:
        notes.append(f"strict: the same bits in {strict_probe(engine)} of as many ways")
    costs = device_costs(loaded, engine.backend, job.conversations.has_turns)
    return PrefixEngine(loaded, settings, engine.backend, costs, notes)


def _small_eviction(job: JobSettings) -> Eviction:
    """What the self-test tries in small."""
    from pipeline.plan.conversations import Eviction

    asked = job.conversations
    return Eviction(asked.evict, sink_tokens=asked.num_sink_tokens, unit=asked.evict_unit)
