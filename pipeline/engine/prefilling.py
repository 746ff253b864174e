"""Computing prompts: what is loaded and copied, and what is packed into forwards of a good size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine import forced_logprobs
from pipeline.engine.answering import End
from pipeline.engine.document_placements import AssembledPlacement
from pipeline.engine.forced_logprobs import Unread
from pipeline.engine.kv_connector import KVConnector
from pipeline.engine.kv_guard import KVGuard
from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefill import Chunk, needs_logits, pack_chunks, split_chunks, take_chunks
from pipeline.engine.run_parts import RunParts
from pipeline.engine.scorer import Scorer
from pipeline.engine.spans import Placement, SharedPlacement


class Prefilling:
    """The prompts of one run; where its rows ask for scores, what is read of them."""

    def __init__(
        self,
        parts: RunParts,
        guard: KVGuard,
        connector: KVConnector | None,
        most_tokens: int,
        scorer: Scorer | None,
    ) -> None:
        """`most_tokens`: of a forward; fewer, once memory has ended with so many."""
        self._parts: Final = parts
        self._guard: Final = guard
        self._connector: Final = connector
        self._most_tokens = most_tokens
        self._scorer: Final = scorer
        self._counters: Final = parts.forwards.counters

    def admit(self, jobs: Sequence[PrefillJob], ready: list[LiveRow]) -> None:
        """Compute the prompts of rows that were admitted; `ready`: those that need no forward."""
        for job in jobs:
            self._fill(job)
        todo = [job for job in jobs[::-1] if job.done < job.end]
        assembled = [job for job in todo if isinstance(job.place, AssembledPlacement)]
        if assembled:  # their documents must be there before they are copied
            self.compute([job for job in todo if not isinstance(job.place, AssembledPlacement)])
            for job in assembled:
                self._assemble(job.place)
            todo = assembled
        self.compute(todo)
        self._start_ready(ready)

    def compute(self, todo: list[PrefillJob]) -> None:
        """From the end of `todo` on, packed."""
        while todo:
            self._compute_few(take_chunks(todo, self._most_tokens))

    def _compute_few(self, taken: list[Chunk]) -> None:
        """As many tokens at once as there is room for what is read of them."""
        tokens = sum(high - low for _, low, high in taken)
        if tokens < 2 or self._has_room(taken):
            self._compute_or_halve(taken)
            return
        for part in split_chunks(taken, tokens // 2):
            self._compute_few(part)

    def _has_room(self, taken: list[Chunk]) -> bool:
        """For the logits that are read of them."""
        if self._scorer is None:
            return forced_logprobs.count(taken) <= forced_logprobs.MOST_READ
        return self._parts.forwards.gives_pieces or self._scorer.has_room(taken)

    def _assemble(self, place: Placement) -> None:
        """Copy what the row sees of documents to where it stands there."""
        rotary = self._parts.rotary
        assert isinstance(place, AssembledPlacement) and rotary is not None
        forwards = self._parts.forwards
        for source, target, shift in place.copies():
            for layer, (keys, values) in enumerate(forwards.cache.arena):
                stored = keys[:, source].transpose(0, 1)
                shifts = torch.full((len(stored),), shift, device=forwards.device)
                keys[:, target] = rotary.turn(layer, stored, shifts).transpose(0, 1)
                values[:, target] = values[:, source]

    def _fill(self, job: PrefillJob) -> None:
        """Put what an earlier run has computed into the job's range."""
        if job.loaded is None:
            return
        forwards = self._parts.forwards
        begin = forwards.now()
        place, span = job.place, job.place.span
        slots = place.slots(place.position, job.done)
        forwards.cache.arena[..., slots, :] = job.loaded.to(forwards.device)
        job.loaded = None
        span.stored_tokens = job.done - place.start
        if not job.is_repeat:
            self._counters.loaded_tokens += span.stored_tokens
        if not isinstance(job.target, LiveRow) and job.done == job.end:
            self._note_full(job.target)
            self._parts.scheduler.note_computed(job.target.span)
        seconds = forwards.now() - begin
        span.prefill_s += seconds
        self._counters.load_s += seconds

    def _note_full(self, shared: SharedPlacement) -> None:
        """All of the span's KV is there; before rows that end below may take it with them."""
        self._guard.watch(shared.span)
        connector, span = self._connector, shared.span
        low = shared.start + span.stored_tokens
        if connector is None or low == shared.end or not connector.wants(span.key):
            return
        arena = self._parts.forwards.cache.arena
        kv = arena[..., shared.slots(low, shared.end), :].to("cpu", copy=True)
        connector.keep(span.sequence, span.ids, low, shared.end, kv)

    def _compute_or_halve(self, taken: list[Chunk]) -> None:
        """Where memory ends, half of the tokens at a time; one token that finds none fails."""
        taken = [chunk for chunk in taken if chunk[0].is_needed]
        if not taken:
            return
        try:
            self._compute_once(taken)
        except (MemoryError, RuntimeError) as error:
            num_tokens = sum(high - low for _, low, high in taken)
            if not self._parts.forwards.can_halve(error, num_tokens):
                self._parts.outcomes.lose(taken[0][0].target, error)
                return
            self._most_tokens = num_tokens // 2
            first, second = split_chunks(taken, num_tokens // 2)
            self._compute_or_halve(first)
            self._compute_or_halve(second)

    def _compute_once(self, taken: list[Chunk]) -> None:
        """One packed forward; sample the first tokens of rows whose prompts end in it."""
        parts = self._parts
        begin = parts.forwards.now()
        batch = pack_chunks(taken, parts.packer)
        if self._scorer is not None:
            self._read(self._scorer, taken, batch)
            self._spread(taken, parts.forwards.now() - begin)
            self._count(taken)
            ends = [job.target for job, _, high in taken if high == job.end]
            parts.outcomes.end_scored(ends, self._scorer)
            return
        readable = [i for i, chunk in enumerate(taken) if needs_logits(chunk)]
        unread = forced_logprobs.unread(taken)
        logits = self._logits(taken, batch, readable, forced_logprobs.places(unread))
        self._read_forced(unread, logits[len(readable) :])
        rows, of_rows = [], []
        for i, index in enumerate(readable):
            target = taken[index][0].target
            if isinstance(target, LiveRow):
                if target.has_ended:
                    continue
                if target.run:
                    target.run = 0
                    parts.scheduler.changes += 1  # it decodes again
                rows.append(target)
                of_rows.append(i)
            else:
                target.span.logits = logits[i].clone()
        self._spread(taken, parts.forwards.now() - begin)
        parts.outcomes.append(rows, logits[of_rows])
        self._count(taken)  # here: a step may end half done

    def _read_forced(self, unread: list[Unread], logits: Tensor) -> None:
        """Log-probabilities of forced tokens; rows that waited for nothing else are finished."""
        if not unread:
            return
        for row in forced_logprobs.note(unread, logits):
            row.over = "error"
        now = self._parts.forwards.now()
        over = [(one.row, one.row.over) for one in unread]
        self._parts.outcomes.finish(
            End(row, reason, now)
            for row, reason in over
            if reason == "error" or (reason and not row.is_unread)
        )

    def _logits(
        self,
        taken: list[Chunk],
        batch: PackedBatch,
        readable: list[int],
        others: NDArray[np.int64],
    ) -> Tensor:
        """Of the last tokens of these chunks, and of other packed ones."""
        forwards, turns = self._parts.forwards, self._parts.turns
        last = np.cumsum([high - low for _, low, high in taken])[readable] - 1
        keep = np.concatenate([last, others])
        if turns is None:
            return forwards.logits(batch, keep)
        with turns.watcher.watching_prefill(taken) as observer:
            return forwards.logits(replace(batch, observer=observer), keep)

    def _read(self, scorer: Scorer, taken: list[Chunk], batch: PackedBatch) -> None:
        """One forward, whose logits are read as they come."""
        at, points = scorer.read(taken)
        low = 0
        for logits in self._parts.forwards.in_pieces(batch, at):
            scorer.note(points[low : low + len(logits)], logits)
            low += len(logits)

    def _spread(self, taken: list[Chunk], seconds: float) -> None:
        """What a forward took, over what it computed; of forced tokens it is decoding."""
        if taken[0][0].run is not None:
            self._counters.decode_s += seconds
            return
        self._counters.prefill_s += seconds
        per_token_s = seconds / sum(high - low for _, low, high in taken)
        for job, low, high in taken:
            if not job.is_repeat:  # a row pays for what it is the first to need
                job.place.span.prefill_s += per_token_s * (high - low)
            if not isinstance(job.target, LiveRow) and high == job.end:
                self._note_full(job.target)

    def _count(self, taken: list[Chunk]) -> None:
        for job, low, high in taken:
            if job.run is not None:  # tokens of an answer, which are counted as such
                continue
            if job.is_repeat:
                self._counters.recomputed_tokens += high - low
            else:
                self._counters.prefilled_tokens += high - low
            if not isinstance(job.target, LiveRow) and high == job.end:
                self._parts.scheduler.note_computed(job.target.span)

    def _start_ready(self, ready: list[LiveRow]) -> None:
        """Rows that end with a shared span: its KV is theirs, and its logits were kept for them."""
        outcomes, cache = self._parts.outcomes, self._parts.forwards.cache
        if self._scorer is not None:
            outcomes.end_scored(ready, self._scorer)
            return
        rows, logits = [], []
        for row in ready:
            if row.has_ended:
                continue
            copied = row.place.copied_slots()
            cache.copy(copied, row.place.span.kv.start + np.arange(len(copied)))
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
            outcomes.append(rows, torch.stack(logits))
