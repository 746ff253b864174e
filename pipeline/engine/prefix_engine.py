"""The engine: every distinct prompt token once, shared prefixes attended together.

Plain synchronous code on one device; knows token ids, not text or files. One try at the work of a
call is a `Run` (`prefix_run.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from pipeline.engine.answered import Answered
from pipeline.engine.arrivals import History
from pipeline.engine.backend import Backend, choose_backend
from pipeline.engine.base import (
    EngineCapabilities,
    EngineHooks,
    Indices,
    LocalEngine,
    RunControl,
)
from pipeline.engine.device_costs import NO_DEVICE_COSTS, DeviceCosts
from pipeline.engine.kv_connector import KVFormat
from pipeline.engine.kv_guard import CorruptKVError
from pipeline.engine.memory import keep_freed_pages
from pipeline.engine.prefix_run import Run, Work
from pipeline.engine.recordings import Recordings
from pipeline.engine.sampler import Sampler
from pipeline.engine.strict_backend import choose_strict_backend
from pipeline.engine.threads import Threads
from pipeline.errors import EngineError, ModelError
from pipeline.model.families import why_unsupported
from pipeline.model.model import LoadedModel
from pipeline.plan.plan import Plan, cut_by_cost
from pipeline.records import Completion
from pipeline.settings import EngineSettings

_MOST_KV_FAULTS = 3
_logger = logging.getLogger("coppice")


class PrefixEngine(LocalEngine):
    """Runs a plan with KV reuse. Raises ModelError for a model whose KV cannot be shared, and
    UsageError for one that strict mode does not cover."""

    name = "prefix"

    def __init__(
        self,
        loaded: LoadedModel,
        settings: EngineSettings,
        backend: Backend | None = None,
        costs: DeviceCosts = NO_DEVICE_COSTS,
        notes: Sequence[str] = (),
    ) -> None:
        """`backend` None: the one that suits model and settings."""
        reason = why_unsupported(loaded.model.config)
        if reason:
            raise ModelError(f"{loaded.source}: {reason}")
        if loaded.device.type == "cpu":
            keep_freed_pages()
        choose = choose_strict_backend if settings.fidelity == "strict" else choose_backend
        self.loaded: Final = loaded
        self.settings: Final = settings
        self.backend: Final = backend or choose(loaded, settings.kernels)
        self.sampler: Final = Sampler(loaded, self.backend.likeliest)
        self.costs: Final = costs
        self.threads: Final = (
            None if self.backend.is_pooled else Threads.chosen(settings, loaded.device)
        )
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        kv = KVFormat(dtype, loaded.shape.kv_bytes_per_token(dtype))
        self.capabilities = EngineCapabilities(
            computes_once=True,
            measures_rates=True,
            shows_logits=True,
            moves_documents=True,
            carries_conversations=True,
            evicts=True,
            reads_scores=True,
            guides=True,
            gives_logprobs=True,
            kv=kv,
            saves_from=costs.saves_from(kv.bytes_per_token),
        )
        note = [self.backend.note] if self.backend.note else []
        super().__init__([*note, *notes, *costs.notes(kv.bytes_per_token)])
        self.recordings: Final = Recordings.of(self.backend, loaded.device, self.notes)

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        """Where the KV of a shared prefix changes by itself, what has not been yielded is computed
        again. Raises EngineError if that happens again and again."""
        break_even = self.costs.break_even
        if break_even is not None and plan.documents is None:
            plan = cut_by_cost(plan, plan.count_below(sequences), break_even)
        answered = Answered(hooks.earlier_turns)
        work = Work(plan, control, hooks, History(hooks.kv_connector, answered.turns))
        left = sequences
        while len(left):
            yielded = []
            try:
                for completion in Run(self, work, left).completions():
                    if answered.note(plan, completion):
                        yielded.append(completion.sequence)
                    yield completion
                return
            except CorruptKVError:
                self.counters.kv_faults += 1
                _logger.warning("the KV of a shared prefix changed by itself; computing it again")
                if self.counters.kv_faults > _MOST_KV_FAULTS:
                    raise EngineError(
                        "the KV of shared prefixes keeps changing by itself; this machine's "
                        "memory is not sound"
                    ) from None
                left = np.setdiff1d(left, [*yielded, *work.history.forgotten])
