"""The engine: every distinct prompt token once, shared prefixes attended together.

One loop on one device: admit, prefill the new nodes packed, decode all live rows by a token,
let finished rows go. Plain synchronous code; knows token ids, not text or files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.answered import Answered
from pipeline.engine.answering import Answering
from pipeline.engine.arrivals import History
from pipeline.engine.backend import Backend, choose_backend
from pipeline.engine.base import (
    EngineCapabilities,
    EngineHooks,
    Indices,
    LocalEngine,
    RunControl,
)
from pipeline.engine.blend import Blend
from pipeline.engine.completions import complete, complete_scored, fail, refuse
from pipeline.engine.cuda_graphs import DecodeStep, NextTokens
from pipeline.engine.decode_view import DecodeView
from pipeline.engine.device_costs import NO_DEVICE_COSTS, DeviceCosts
from pipeline.engine.document_placements import AssembledPlacement
from pipeline.engine.forward import PiecewiseForward
from pipeline.engine.host_states import HostStates
from pipeline.engine.kept_kv import KeptKV
from pipeline.engine.kv_connector import KVFormat
from pipeline.engine.kv_guard import CorruptKVError, KVGuard
from pipeline.engine.layout import layout_of
from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.memory import is_exhausted, keep_freed_pages, release_cached
from pipeline.engine.packing import PackedBatch, Packer, decode_spans, pack_decode
from pipeline.engine.policy import DepthFirstPolicy
from pipeline.engine.prefill import Chunk, needs_logits, pack_chunks, split_chunks, take_chunks
from pipeline.engine.recordings import Recordings, reserve
from pipeline.engine.residency import Residency
from pipeline.engine.rotary import Rotary
from pipeline.engine.runs import take_runs
from pipeline.engine.sampler import Sampler
from pipeline.engine.sampling import Sampled
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.scorer import ROWS_AT_ONCE, Scorer, most_rows
from pipeline.engine.spans import Placement, SharedPlacement
from pipeline.engine.strict_backend import choose_strict_backend
from pipeline.engine.threads import Threads
from pipeline.engine.turns import Turns
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
        self.threads: Final = Threads.chosen(settings, loaded.device)
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
        work = _Work(plan, control, hooks)
        answered = Answered(hooks.earlier_turns)
        left, history = sequences, History(hooks.kv_connector, answered.turns)
        while len(left):
            yielded = []
            try:
                for completion in _Run(self, work, left, history).completions():
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
                left = np.setdiff1d(left, [*yielded, *history.forgotten])


@dataclass(frozen=True)
class _Work:
    """What `generate` was called with."""

    plan: Plan
    control: RunControl
    hooks: EngineHooks


class _Run:
    """One try at the work of a `generate` call."""

    def __init__(
        self, engine: PrefixEngine, work: _Work, sequences: NDArray[np.int64], history: History
    ) -> None:
        loaded, settings = engine.loaded, engine.settings
        self.backend = engine.backend
        documents = work.plan.documents
        moves = documents is not None or work.plan.evicts
        self.rotary = Rotary.of(loaded.model) if moves else None
        self.packer = Packer(engine.backend.kernel, loaded.device, self.rotary)
        self.device = loaded.device
        self.hooks = work.hooks
        self.answering = Answering(work.plan, work.control, work.hooks, engine.sampler)
        self.counters = engine.counters
        self.plan = work.plan
        self.control = work.control
        self.threads = engine.threads
        self.max_batch_tokens = settings.max_batch_tokens
        self.max_decode_rows = settings.max_rows
        choose = None
        if documents is not None and self.rotary is not None and documents.reuse.blend_share:
            choose = Blend(loaded.model, self.rotary, documents.reuse).choose
        layout = layout_of(self.plan, sequences, choose, loaded.shape.slides)
        self.cache, self.runner = reserve(
            engine.recordings, loaded, settings.kv_budget, layout.most_tokens
        )
        self.guard = KVGuard(self.cache)
        self.policy = DepthFirstPolicy(settings.max_rows)
        residency = Residency(self.cache, self.guard.release)
        kept = KeptKV(residency, self.rotary)
        states = HostStates(kept, settings.spill_memory, engine.costs.spill, engine.counters)
        self.scheduler = Scheduler(self.plan, layout, residency, self.policy, history, states)
        scores = self.plan.scores
        self.scorer = None if scores is None else Scorer(self.plan, scores)
        row_bytes = loaded.shape.vocabulary_size * self.cache.arena.element_size()
        self.most_read = most_rows(row_bytes, self.device.type == "cpu")
        self.turns = None
        if self.plan.conversations is not None:
            self.turns = Turns(self.plan, self.scheduler, kept, history.begun)
        self.start_s = time.perf_counter()
        self.first_step_s: float | None = None
        self.view = DecodeView()
        self.finished: list[Completion] = []

    @torch.inference_mode()
    def completions(self) -> Iterator[Completion]:
        is_over = False
        try:
            while not is_over and not self.control.should_abort():
                if self.threads is not None:
                    self.threads.adapt()
                self._admit()
                if self.turns is not None:
                    self._begin_turns(self.turns)
                self._prefill(take_runs(self.scheduler)[::-1])
                self._decode_one_step()
                is_last = self.control.should_drain() or not self.scheduler.waiting
                is_over = is_last and not self.scheduler.has_begun
                if self.finished and (self.guard.check_if_due() or is_over):
                    done, self.finished = self.finished, []
                    self.counters.cached_tokens += sum(row.cached_tokens for row in done)
                    yield from done
        finally:
            if self.threads is not None:
                self.threads.restore()

    def _admit(self) -> None:
        """Let rows in and prefill them; a drain lets back in what was preempted."""
        now = self._now()
        if self.control.wants_back():
            self.scheduler.forget(self.control.take_back(self.scheduler.not_begun()))
        admission = self.scheduler.admit(now, only_begun=self.control.should_drain())
        budget = self.cache.capacity * self.cache.bytes_per_token
        for sequence in admission.refused:
            self.finished += refuse(self.plan, sequence, budget, now)
        for job in admission.jobs:
            self._fill(job)
        todo = [job for job in admission.jobs[::-1] if job.done < job.end]
        assembled = [job for job in todo if isinstance(job.place, AssembledPlacement)]
        if assembled:  # their documents must be there before they are copied
            self._prefill([job for job in todo if not isinstance(job.place, AssembledPlacement)])
            for job in assembled:
                self._assemble(job.place)
            todo = assembled
        self._prefill(todo)
        self._start_ready(admission.ready)

    def _begin_turns(self, turns: Turns) -> None:
        """Compute again what conversations have lost, then the prompts of their next turns."""
        while jobs := turns.replays():
            self._prefill(jobs[::-1])
        jobs, failed = turns.begin(self._now(), self.control.should_drain())
        self.finished += failed
        self._prefill(jobs[::-1])

    def _prefill(self, todo: list[PrefillJob]) -> None:
        while todo:
            self._prefill_few(take_chunks(todo, self.max_batch_tokens))

    def _prefill_few(self, taken: list[Chunk]) -> None:
        """As many tokens at once as there is room for what is read of them."""
        tokens = sum(high - low for _, low, high in taken)
        scorer, in_pieces = self.scorer, isinstance(self.backend.forward, PiecewiseForward)
        if scorer is None or in_pieces or tokens < 2 or scorer.count(taken) <= self.most_read:
            self._prefill_or_halve(taken)
            return
        for part in split_chunks(taken, tokens // 2):
            self._prefill_few(part)

    def _assemble(self, place: Placement) -> None:
        """Copy what the row sees of documents to where it stands there."""
        assert isinstance(place, AssembledPlacement) and self.rotary is not None
        for source, target, shift in place.copies():
            for layer, (keys, values) in enumerate(self.cache.arena):
                stored = keys[:, source].transpose(0, 1)
                shifts = torch.full((len(stored),), shift, device=self.device)
                keys[:, target] = self.rotary.turn(layer, stored, shifts).transpose(0, 1)
                values[:, target] = values[:, source]

    def _fill(self, job: PrefillJob) -> None:
        """Put what an earlier run has computed into the job's range."""
        if job.loaded is None:
            return
        begin = self._now()
        place, span = job.place, job.place.span
        self.cache.arena[..., place.slots(place.position, job.done), :] = job.loaded.to(self.device)
        job.loaded = None
        span.stored_tokens = job.done - place.start
        if not job.is_repeat:
            self.counters.loaded_tokens += span.stored_tokens
        if not isinstance(job.target, LiveRow) and job.done == job.end:
            self._note_full(job.target)
            self.scheduler.note_computed(job.target.span)
        seconds = self._now() - begin
        span.prefill_s += seconds
        self.counters.load_s += seconds

    def _note_full(self, shared: SharedPlacement) -> None:
        """All of the span's KV is there; before rows that end below may take it with them."""
        self.guard.watch(shared.span)
        connector, span = self.hooks.kv_connector, shared.span
        low = shared.start + span.stored_tokens
        if connector is None or low == shared.end or not connector.wants(span.key):
            return
        kv = self.cache.arena[..., shared.slots(low, shared.end), :].to("cpu", copy=True)
        connector.keep(span.sequence, span.ids, low, shared.end, kv)

    def _prefill_or_halve(self, taken: list[Chunk]) -> None:
        """Where memory ends, half of the tokens at a time; one token that finds none fails."""
        taken = [chunk for chunk in taken if chunk[0].is_needed]
        if not taken:
            return
        try:
            self._prefill_once(taken)
        except (MemoryError, RuntimeError) as error:
            num_tokens = sum(high - low for _, low, high in taken)
            if not self._can_halve(error, num_tokens):
                self._lose(taken[0][0].target, error)
                return
            self.max_batch_tokens = num_tokens // 2
            first, second = split_chunks(taken, num_tokens // 2)
            self._prefill_or_halve(first)
            self._prefill_or_halve(second)

    def _can_halve(self, error: BaseException, size: int) -> bool:
        """Raises `error` unless memory is what failed."""
        if not is_exhausted(error):
            raise error
        self.counters.memory_retries += 1
        release_cached(self.device)
        return size > 1

    def _lose(self, target: SharedPlacement | LiveRow, error: BaseException) -> None:
        """Rows that need `target` become errors, never the job."""
        message = f"not even one token fits into memory: {str(error).splitlines()[0]}"
        for row in self.scheduler.rows_below(target):
            self._end(row, fail(row, message, self._now()))
        self.scheduler.evict_idle()  # what was not computed must not be found by later rows

    def _prefill_once(self, taken: list[Chunk]) -> None:
        """One packed forward; sample the first tokens of rows whose prompts end in it."""
        begin = self._now()
        lengths = np.array([high - low for _, low, high in taken])
        batch = pack_chunks(taken, self.packer)
        if self.scorer is not None:
            self._score(self.scorer, taken, batch)
            self._spread(taken, self._now() - begin)
            self._count_prefill(taken)
            self._end_scored([job.target for job, _, high in taken if high == job.end])
            return
        readable = [i for i, chunk in enumerate(taken) if needs_logits(chunk)]
        keep = np.cumsum(lengths)[readable] - 1
        if self.turns is None:
            logits = self._forward(batch, keep)
        else:
            with self.turns.watcher.watching_prefill(taken) as observer:
                logits = self._forward(replace(batch, observer=observer), keep)
        rows, of_rows = [], []
        for i, index in enumerate(readable):
            target = taken[index][0].target
            if isinstance(target, LiveRow):
                if target.run:
                    target.run = 0
                    self.scheduler.changes += 1  # it decodes again
                rows.append(target)
                of_rows.append(i)
            else:
                target.span.logits = logits[i].clone()
        self._spread(taken, self._now() - begin)
        self._append_tokens(rows, logits[of_rows])
        self._count_prefill(taken)  # here: a step may end half done

    def _score(self, scorer: Scorer, taken: list[Chunk], batch: PackedBatch) -> None:
        """One forward, whose logits are read as they come."""
        at, points = scorer.read(taken)
        forward = self.backend.forward
        if not isinstance(forward, PiecewiseForward):
            scorer.note(points, self._forward(batch, at))
            return
        begin = time.perf_counter()
        self.first_step_s = self.first_step_s or begin
        indices, low = torch.from_numpy(at).to(self.device), 0
        for logits in forward.in_pieces(batch, self.cache, indices, ROWS_AT_ONCE):
            scorer.note(points[low : low + len(logits)], logits)
            low += len(logits)
        self.counters.num_forwards += 1
        self._count_busy(begin)

    def _end_scored(self, targets: Sequence[SharedPlacement | LiveRow]) -> None:
        """Rows all of whose prompt was computed, and read where it is asked for."""
        assert self.scorer is not None
        now = self._now()
        for row in targets:
            if isinstance(row, LiveRow) and not row.has_ended:
                row.first_token_s = now
                self._end(row, complete_scored(row, self.scorer.scored(row.sequence), now))

    def _spread(self, taken: list[Chunk], seconds: float) -> None:
        """What a forward took, over what it computed; of forced tokens it is decoding."""
        if taken[0][0].run is not None:
            self.counters.decode_s += seconds
            return
        self.counters.prefill_s += seconds
        per_token_s = seconds / sum(high - low for _, low, high in taken)
        for job, low, high in taken:
            if not job.is_repeat:  # a row pays for what it is the first to need
                job.place.span.prefill_s += per_token_s * (high - low)
            if not isinstance(job.target, LiveRow) and high == job.end:
                self._note_full(job.target)

    def _count_prefill(self, taken: list[Chunk]) -> None:
        for job, low, high in taken:
            if job.run is not None:  # tokens of an answer, which are counted as such
                continue
            if job.is_repeat:
                self.counters.recomputed_tokens += high - low
            else:
                self.counters.prefilled_tokens += high - low
            if not isinstance(job.target, LiveRow) and high == job.end:
                self.scheduler.note_computed(job.target.span)

    def _start_ready(self, ready: list[LiveRow]) -> None:
        """Rows that end with a shared span: its KV is theirs, and its logits were kept for them."""
        if self.scorer is not None:
            self._end_scored(ready)
            return
        rows, logits = [], []
        for row in ready:
            if row.has_ended:
                continue
            copied = row.place.copied_slots()
            self.cache.copy(copied, row.place.span.kv.start + np.arange(len(copied)))
            if row.token_ids:  # was preempted after its first token
                continue
            assert row.place.above is not None and row.place.start == row.end
            span = row.place.above.span
            assert span.logits is not None
            rows.append(row)
            logits.append(span.logits)
            span.unread -= 1
            if not span.unread:
                span.logits = None
        if rows:
            self._append_tokens(rows, torch.stack(logits))

    def _decode_one_step(self) -> None:
        """One more token for every live row that keeps its place."""
        if self.turns is not None:
            self.turns.evictions.make_room(self.scheduler.decoding())
        self.scheduler.grow()
        rows = self.scheduler.decoding()
        while rows:
            width = self.max_decode_rows
            try:
                self._decode_rows(rows[:width])
            except (MemoryError, RuntimeError) as error:
                if self._can_halve(error, len(rows[:width])):
                    self.max_decode_rows = len(rows[:width]) // 2
                    self.policy.halve()
                    continue
                self._lose(rows[0], error)
            rows = rows[width:]

    def _decode_rows(self, rows: list[LiveRow]) -> None:
        """One forward: a token for each of `rows`, neighbours in depth-first order."""
        begin = self._now()
        token_ids = np.array([r.token_ids[-1] for r in rows], np.int64)
        positions, own = self.view.own(rows, self.scheduler.changes)
        before, documents = self.view.before(rows, self.scheduler.changes)
        if self.runner is None or documents is not None or self.turns is not None:
            batch = pack_decode(token_ids, positions, own, before, self.packer, documents)
            self._append_tokens(rows, self._step(rows, batch))
        else:
            spans = decode_spans(positions, own, before)
            chosen = self._run_recorded(DecodeStep(token_ids, positions, own[1] - 1, spans))
            self._append_tokens(rows, chosen.logits, chosen.greedy)
        self.counters.decode_s += self._now() - begin

    def _step(self, rows: list[LiveRow], batch: PackedBatch) -> Tensor:
        """Logits of a packed step of `rows`."""
        every = np.arange(len(rows))
        if self.turns is None:
            return self._forward(batch, every)
        with self.turns.watcher.watching_decode(rows) as observer:
            return self._forward(replace(batch, observer=observer), every)

    def _forward(self, batch: PackedBatch, keep: NDArray[np.int64]) -> Tensor:
        """Logits [len(keep), V], in the model's dtype, of the packed positions `keep`."""
        begin = time.perf_counter()
        if self.first_step_s is None:
            self.first_step_s = begin
        indices = torch.from_numpy(keep).to(self.device)
        logits = self.backend.forward(batch, self.cache, indices)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.counters.num_forwards += 1
        self._count_busy(begin)
        return logits

    def _run_recorded(self, step: DecodeStep) -> NextTokens:
        """A decode step that also chooses greedy tokens on the device."""
        assert self.runner is not None
        begin = time.perf_counter()
        tokens = self.runner(step)
        self.counters.num_forwards += 1
        self._count_busy(begin)
        return tokens

    def _append_tokens(
        self, rows: list[LiveRow], logits: Tensor, greedy: Sampled | None = None
    ) -> None:
        """Sample the next token of each row; rows that end are finished."""
        if not rows:
            return
        begin = time.perf_counter()
        started = [row for row in rows if not row.token_ids]
        forced = -sum(row.forced_tokens for row in rows)
        ended = self.answering.append(rows, logits, greedy)
        forced += sum(row.forced_tokens for row in rows)
        self.scheduler.changes += forced > 0  # rows with forced tokens wait
        self._count_busy(begin)
        now = self._now()
        for row in started:
            row.first_token_s = now
        for row, reason in ended:
            self._end(row, complete(row, reason, now))
        self.counters.generated_tokens += len(rows) + forced
        self.counters.forced_tokens += forced

    def _end(self, row: LiveRow, completion: Completion) -> None:
        if self.turns is None:
            self.scheduler.finish(row)
            self.finished.append(completion)
        else:
            self.finished += self.turns.end(row, completion, self._now())
        self.counters.peak_kv_bytes = self.cache.peak_tokens * self.cache.bytes_per_token

    def _now(self) -> float:
        """Seconds since the engine started."""
        return time.perf_counter() - self.start_s

    def _count_busy(self, begin: float) -> None:
        end = time.perf_counter()
        self.counters.busy_s += end - begin
        self.counters.span_s = end - (self.first_step_s or begin)
