"""One try at the work of a call: admit, prefill what is new, decode, let finished rows go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine.answering import Answering
from pipeline.engine.arrivals import History
from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.blend import Blend
from pipeline.engine.completions import refuse
from pipeline.engine.decoding import Decoding
from pipeline.engine.forwards import Forwards
from pipeline.engine.host_states import HostStates
from pipeline.engine.kept_kv import KeptKV
from pipeline.engine.kv_guard import KVGuard
from pipeline.engine.layout import Layout, layout_of
from pipeline.engine.outcomes import Outcomes
from pipeline.engine.packing import Packer
from pipeline.engine.policy import DepthFirstPolicy
from pipeline.engine.prefilling import Prefilling
from pipeline.engine.recordings import reserve
from pipeline.engine.residency import Residency
from pipeline.engine.rotary import Rotary
from pipeline.engine.run_parts import RunParts
from pipeline.engine.runs import take_runs
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.scorer import Scorer, most_rows
from pipeline.engine.strides import Strides
from pipeline.engine.turns import Turns
from pipeline.plan.plan import Plan
from pipeline.records import Completion

if TYPE_CHECKING:
    from pipeline.engine.prefix_engine import PrefixEngine


@dataclass(frozen=True)
class Work:
    """What `generate` was called with, and what was computed of it before."""

    plan: Plan
    control: RunControl
    hooks: EngineHooks
    history: History


class Run:
    """The loop. Its parts know neither each other's work nor this one."""

    def __init__(self, engine: PrefixEngine, work: Work, sequences: NDArray[np.int64]) -> None:
        loaded, settings, plan = engine.loaded, engine.settings, work.plan
        rotary = None
        if plan.documents is not None or plan.evicts:
            rotary = Rotary.of(loaded.model)
        layout = _lay_out(engine, plan, sequences, rotary)
        cache, runner = reserve(engine.recordings, loaded, settings.kv_budget, layout.most_tokens)
        guard, policy = KVGuard(cache), DepthFirstPolicy(settings.max_rows)
        residency = Residency(cache, guard.release)
        kept = KeptKV(residency, rotary)
        states = HostStates(kept, settings.spill_memory, engine.costs.spill, engine.counters)
        scheduler = Scheduler(plan, layout, residency, policy, work.history, states)
        turns = None
        if plan.conversations is not None:
            turns = Turns(plan, scheduler, kept, work.history.begun)
        forwards = Forwards(engine.backend, cache, runner, loaded.device, engine.counters)
        answering = Answering(plan, work.control, work.hooks, engine.sampler)
        outcomes = Outcomes(answering, scheduler, forwards, turns)
        packer = Packer(engine.backend.kernel, loaded.device, rotary)
        parts = RunParts(scheduler, forwards, outcomes, packer, turns, rotary)
        scorer = None
        if plan.scores is not None:
            row_bytes = loaded.shape.vocabulary_size * cache.arena.element_size()
            scorer = Scorer(plan, plan.scores, most_rows(row_bytes, loaded.device.type == "cpu"))
        self._plan, self._control, self._parts = plan, work.control, parts
        self._guard, self._threads = guard, engine.threads
        connector = work.hooks.kv_connector
        self._prefilling = Prefilling(parts, guard, connector, settings.max_batch_tokens, scorer)
        strides, may_stride = None, turns is None and plan.documents is None
        if runner is not None and may_stride and not answering.is_watched:
            strides = Strides(answering, forwards, runner)
        self._decoding = Decoding(parts, policy, settings.max_rows, strides)

    @torch.inference_mode()
    def completions(self) -> Iterator[Completion]:
        scheduler, outcomes = self._parts.scheduler, self._parts.outcomes
        is_over = False
        try:
            while not is_over and not self._control.should_abort():
                if self._threads is not None:
                    self._threads.adapt()
                self._admit()
                if self._parts.turns is not None:
                    self._begin_turns(self._parts.turns)
                self._prefilling.compute(take_runs(scheduler)[::-1])
                self._decoding.step()
                is_last = self._control.should_drain() or not scheduler.waiting
                is_over = is_last and not scheduler.has_begun
                if outcomes.finished and (self._guard.check_if_due() or is_over):
                    done = outcomes.take()
                    counters = self._parts.forwards.counters
                    counters.cached_tokens += sum(row.cached_tokens for row in done)
                    yield from done
        finally:
            if self._threads is not None:
                self._threads.restore()

    def _admit(self) -> None:
        """Let rows in and prefill them; a drain lets back in what was preempted."""
        scheduler, cache = self._parts.scheduler, self._parts.forwards.cache
        now = self._parts.forwards.now()
        if self._control.wants_back():
            scheduler.forget(self._control.take_back(scheduler.not_begun()))
        admission = scheduler.admit(now, only_begun=self._control.should_drain())
        budget = cache.capacity * cache.bytes_per_token
        for sequence in admission.refused:
            self._parts.outcomes.finished += refuse(self._plan, sequence, budget, now)
        self._prefilling.admit(admission.jobs, admission.ready)

    def _begin_turns(self, turns: Turns) -> None:
        """Compute again what conversations have lost, then the prompts of their next turns."""
        while jobs := turns.replays():
            self._prefilling.compute(jobs[::-1])
        now = self._parts.forwards.now()
        jobs, failed = turns.begin(now, self._control.should_drain())
        self._parts.outcomes.finished += failed
        self._prefilling.compute(jobs[::-1])


def _lay_out(
    engine: PrefixEngine, plan: Plan, sequences: NDArray[np.int64], rotary: Rotary | None
) -> Layout:
    choose, documents = None, plan.documents
    if documents is not None and rotary is not None and documents.reuse.blend_share:
        choose = Blend(engine.loaded.model, rotary, documents.reuse).choose
    return layout_of(plan, sequences, choose)
