"""The engine: every distinct prompt token once, shared prefixes attended together.

One loop on one device: admit, prefill the new nodes packed, decode all live rows by a token,
let finished rows go. Plain synchronous code; knows token ids, not text or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.backend import choose_backend
from pipeline.engine.base import EngineCounters, RunControl
from pipeline.engine.cost_model import CostModel
from pipeline.engine.cuda_graphs import DecodeStep, NextTokens, decode_runner
from pipeline.engine.kernels.rules import Segments
from pipeline.engine.kv_cache import kv_capacity, reserve_kv
from pipeline.engine.memory import is_exhausted, release_cached
from pipeline.engine.model import LoadedModel
from pipeline.engine.outcome import complete, fail, refuse
from pipeline.engine.packing import (
    PackedBatch,
    Piece,
    decode_segments,
    pack_decode,
    pack_prefill,
    shared_segments,
)
from pipeline.engine.sampling import Sampled, sample_next_token
from pipeline.engine.scheduler import (
    LiveNode,
    LiveRow,
    PrefillJob,
    Scheduler,
    active_counts,
    copied_head,
    kv_tokens_if_all_at_once,
    spans_before,
)
from pipeline.engine.support import why_unsupported
from pipeline.errors import ModelError
from pipeline.plan.plan import Plan, cut_by_cost
from pipeline.records import Completion, FinishReason
from pipeline.settings import EngineSettings

LogitsProbe = Callable[[list[int], list[int], Tensor], None]
"""Called with (sequences, output positions, logits [rows, V]) of every token that is chosen."""


Chunk = tuple[PrefillJob, int, int]
"""Prompt positions `[low, high)` of a job, to be computed in one forward."""


class PrefixEngine:
    """Runs a plan with KV reuse. Raises ModelError for a model whose KV cannot be shared."""

    name = "prefix"

    def __init__(self, loaded: LoadedModel, settings: EngineSettings) -> None:
        reason = why_unsupported(loaded.model.config)
        if reason:
            raise ModelError(f"{loaded.source}: {reason}")
        self.loaded = loaded
        self.settings = settings
        self.counters = EngineCounters()
        self.backend = choose_backend(loaded, settings.kernels)
        self.notes: list[str] = [self.backend.note] if self.backend.note else []
        self.logits_probe: LogitsProbe | None = None
        self.cost_model: CostModel | None = None
        """Where it is known, it decides which spans rows share in decode, not the plan's rule."""

    def generate(
        self, plan: Plan, sequences: NDArray[np.int64], control: RunControl
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self.counters = EngineCounters()
        if self.cost_model is not None:
            below = active_counts(plan, sequences)
            plan = cut_by_cost(plan, below, self.cost_model.break_even_tokens)
        needed = kv_tokens_if_all_at_once(plan, sequences)
        run = _Run(self, plan, sequences, control, needed)
        yield from run.completions()


class _Run:
    """The state of one `generate` call."""

    def __init__(
        self,
        engine: PrefixEngine,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        needed_tokens: int,
    ) -> None:
        loaded, settings = engine.loaded, engine.settings
        self.backend = engine.backend
        self.device = loaded.device
        self.probe = engine.logits_probe
        self.counters = engine.counters
        self.plan = plan
        self.control = control
        self.max_batch_tokens = settings.max_batch_tokens
        self.max_decode_rows = settings.max_rows
        weight = next(loaded.model.parameters())
        shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
        bytes_per_token = loaded.shape.kv_bytes_per_token(str(weight.dtype).removeprefix("torch."))
        capacity = kv_capacity(settings.kv_budget, bytes_per_token, needed_tokens, self.device)
        self.cache = reserve_kv(shape, capacity, like=weight)
        self.runner = decode_runner(engine.backend, self.cache, self.device)
        self.scheduler = Scheduler(plan, sequences, self.cache, settings.max_rows)
        self.eos = frozenset(loaded.shape.eos_token_ids)
        self.start_s = time.perf_counter()
        self.first_step_s: float | None = None
        self.shared_above: dict[int, Segments] = {}  # of decoding rows, by the first one's place
        self.finished: list[Completion] = []

    @torch.inference_mode()
    def completions(self) -> Iterator[Completion]:
        """The engine's loop."""
        scheduler = self.scheduler
        while not self.control.should_abort():
            if not self.control.should_drain():
                self._prefill(scheduler.admit(self._now()))
                if scheduler.is_stuck:
                    self._reject(scheduler.reject())
            self._decode_one_step()
            yield from self._take_finished()
            if not scheduler.rows and (not scheduler.waiting or self.control.should_drain()):
                return

    def _prefill(self, jobs: list[PrefillJob]) -> None:
        """Run the jobs in forwards of at most `max_batch_tokens` tokens; sample first tokens."""
        todo = jobs[::-1]
        while todo:
            taken: list[Chunk] = []
            room = self.max_batch_tokens
            while todo and room:
                job = todo[-1]
                stop = min(job.target.end, job.done + room)
                taken.append((job, job.done, stop))
                room -= stop - job.done
                job.done = stop
                if stop == job.target.end:
                    todo.pop()
            self._prefill_or_halve(taken)
        self._read_kept_logits()

    def _prefill_or_halve(self, taken: list[Chunk]) -> None:
        """Where memory ends, half of the tokens at a time; one token that finds none fails."""
        taken = [chunk for chunk in taken if self.scheduler.rows_below(chunk[0].target)]
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

    def _lose(self, target: LiveNode | LiveRow, error: BaseException) -> None:
        """Rows that need `target` become errors, never the job."""
        message = f"not even one token fits into memory: {str(error).splitlines()[0]}"
        for row in self.scheduler.rows_below(target):
            self._end(row, fail(row, message, self._now()))

    def _prefill_once(self, taken: list[Chunk]) -> None:
        """One packed forward over prompt positions `[low, high)` of each job."""
        begin = self._now()
        pieces, heads, places = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for job, low, high in taken:
            target = job.target
            slot = target.kv.start + low - target.span_start
            ids = job.token_ids[low - target.start : high - target.start]
            own = (slot - (low - target.start), slot)
            pieces.append(Piece(ids, low, slot, own, spans_before(target, target.start)))
            if low == target.start > target.span_start:
                heads.append(copied_head(target))
                places.append(target.kv.start + np.arange(len(heads[-1])))
        copies = np.concatenate(heads), np.concatenate(places)
        ends = np.cumsum([len(p) for p in pieces]) - 1
        readable = [
            i for i, (job, _, high) in enumerate(taken)
            if high == job.target.end and (isinstance(job.target, LiveRow) or job.target.unread)
        ]  # fmt: skip
        logits = self._forward(
            pack_prefill(pieces, copies, self.backend.kernel, self.device), ends[readable]
        )
        rows, of_rows = [], []
        for i, place in enumerate(readable):
            target = taken[place][0].target
            if isinstance(target, LiveNode):
                target.logits = logits[i].clone()
            else:
                rows.append(target)
                of_rows.append(i)
        seconds = self._now() - begin
        for piece, (job, _, _) in zip(pieces, taken, strict=True):
            job.target.prefill_s += seconds * len(piece) / int(ends[-1] + 1)
        self._append_tokens(rows, logits[of_rows])
        self.counters.prefilled_tokens += int(ends[-1] + 1)  # here: a step may end half done
        self.counters.prefill_s += seconds

    def _read_kept_logits(self) -> None:
        """First tokens of rows that end at a shared node: its logits were kept for them."""
        rows = [r for r in self.scheduler.rows if not r.token_ids]
        if not rows:
            return
        logits = []
        for row in rows:
            node = row.above
            assert node is not None and node.logits is not None and row.start == row.end
            head = copied_head(row)
            self.cache.copy(head, row.kv.start + np.arange(len(head)))
            logits.append(node.logits)
            node.unread -= 1
            if not node.unread:
                node.logits = None
        self._append_tokens(rows, torch.stack(logits))

    def _decode_one_step(self) -> None:
        """One more token for every live row."""
        rows = list(self.scheduler.rows)
        while rows:
            width = self.max_decode_rows
            try:
                self._decode_rows(rows[:width])
            except (MemoryError, RuntimeError) as error:
                if self._can_halve(error, len(rows[:width])):
                    self.max_decode_rows = len(rows[:width]) // 2
                    self.scheduler.max_rows = max(1, self.scheduler.max_rows // 2)
                    self.shared_above.clear()
                    continue
                self._lose(rows[0], error)
            rows = rows[width:]

    def _decode_rows(self, rows: list[LiveRow]) -> None:
        """One forward: a token for each of `rows`, neighbours in depth-first order."""
        begin = self._now()
        place = rows[0].sequence
        if place not in self.shared_above:
            bounds = [(i, i + 1) for i in range(len(rows))]
            spans = [spans_before(r, r.span_start) for r in rows]
            self.shared_above[place] = shared_segments(spans, bounds)
        token_ids = np.array([r.token_ids[-1] for r in rows], np.int64)
        positions = np.array([r.end + len(r.token_ids) - 1 for r in rows], np.int64)
        first = np.array([r.kv.start for r in rows], np.int64)
        last = first + positions - np.array([r.span_start for r in rows], np.int64)
        own, shared = (first, last + 1), self.shared_above[place]
        if self.runner is None:
            kernel, device = self.backend.kernel, self.device
            batch = pack_decode(token_ids, positions, own, shared, kernel, device)
            self._append_tokens(rows, self._forward(batch, np.arange(len(rows))))
        else:
            step = DecodeStep(token_ids, positions, last, decode_segments(positions, own, shared))
            chosen = self._run_recorded(step)
            self._append_tokens(rows, chosen.logits, chosen.greedy)
        self.counters.decode_s += self._now() - begin

    def _forward(self, batch: PackedBatch, keep: NDArray[np.int64]) -> Tensor:
        """Logits [len(keep), V] float32 of the packed positions `keep`."""
        begin = time.perf_counter()
        if self.first_step_s is None:
            self.first_step_s = begin
        places = torch.from_numpy(keep).to(self.device)
        logits = self.backend.forward(batch, self.cache, places).float()
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
        positions = np.array([len(r.token_ids) for r in rows], np.int64)
        keys = self.plan.sequences.noise_key[[r.sequence for r in rows]]
        if self.probe is not None:
            self.probe([r.sequence for r in rows], positions.tolist(), logits)
        params = [r.params for r in rows]
        chosen = sample_next_token(logits, params, keys, positions, greedy)
        self._count_busy(begin)
        now = self._now()
        ids, finite = chosen.token_ids.tolist(), chosen.is_finite.tolist()
        for row, token_id, is_finite in zip(rows, ids, finite, strict=True):
            if not row.token_ids:
                row.first_token_s = now
                self.shared_above.clear()  # one more row decodes from here on
            row.token_ids.append(token_id)
            reason = self._finish_reason(row) if is_finite else "error"
            if reason:
                self._end(row, complete(row, reason, now))
        self.counters.generated_tokens += len(rows)

    def _finish_reason(self, row: LiveRow) -> FinishReason | None:
        params = row.params
        if row.token_ids[-1] in self.eos and not params.ignore_eos:
            return "stop"
        if params.stop and self.control.is_stopped(row.token_ids, params.stop):
            return "stop"
        return "length" if len(row.token_ids) >= params.max_new_tokens else None

    def _end(self, row: LiveRow, completion: Completion) -> None:
        self.shared_above.clear()
        self.scheduler.finish(row)
        self.counters.cached_tokens += row.cached_tokens
        self.counters.peak_kv_bytes = self.cache.peak_tokens * self.cache.bytes_per_token
        self.finished.append(completion)

    def _reject(self, sequence: int) -> None:
        """A sequence whose KV does not fit the budget becomes an error, never the job."""
        budget = self.cache.capacity * self.cache.bytes_per_token
        self.finished.append(refuse(self.plan, sequence, budget, self._now()))

    def _take_finished(self) -> list[Completion]:
        taken, self.finished = self.finished, []
        return taken

    def _now(self) -> float:
        """Seconds since the engine started."""
        return time.perf_counter() - self.start_s

    def _count_busy(self, begin: float) -> None:
        end = time.perf_counter()
        self.counters.busy_s += end - begin
        self.counters.span_s = end - (self.first_step_s or begin)


def split_chunks(chunks: list[Chunk], num_tokens: int) -> tuple[list[Chunk], list[Chunk]]:
    """(the first `num_tokens` tokens of `chunks`, the others), in order."""
    first: list[Chunk] = []
    second: list[Chunk] = []
    room = num_tokens
    for job, low, high in chunks:
        cut = min(high, low + room)
        room -= cut - low
        if low < cut:
            first.append((job, low, cut))
        if cut < high:
            second.append((job, cut, high))
    return first, second
