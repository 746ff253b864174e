"""Decoding: tokens for all live rows, in steps of as many rows as memory allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from torch import Tensor

from pipeline.engine.decode_view import DecodeView
from pipeline.engine.live import LiveRow
from pipeline.engine.packing import PackedBatch, decode_spans, pack_decode
from pipeline.engine.policy import DepthFirstPolicy
from pipeline.engine.run_parts import RunParts
from pipeline.engine.step_memory import DecodeStep
from pipeline.engine.strides import STEPS, Strides


class Decoding:
    """The answers of one run."""

    def __init__(
        self,
        parts: RunParts,
        policy: DepthFirstPolicy,
        most_rows: int,
        strides: Strides | None = None,
    ) -> None:
        """`most_rows`: of a forward; fewer, once memory has ended with so many. `strides`: where
        steps need not wait for the host."""
        self._parts: Final = parts
        self._policy: Final = policy
        self._most_rows = most_rows
        self._view: Final = DecodeView()
        self._strides: Final = strides

    def step(self) -> None:
        """One more token for every live row that keeps its place, or some more."""
        parts = self._parts
        if parts.turns is not None:
            parts.turns.evictions.make_room(parts.scheduler.decoding())
        most_steps = parts.scheduler.grow(1 if self._strides is None else STEPS)
        rows = parts.scheduler.decoding()
        while rows:
            width = self._most_rows
            try:
                self._decode(rows[:width], most_steps)
            except (MemoryError, RuntimeError) as error:
                if parts.forwards.can_halve(error, len(rows[:width])):
                    self._most_rows = len(rows[:width]) // 2
                    self._policy.halve()
                    continue
                parts.outcomes.lose(rows[0], error)
            rows = rows[width:]

    def _decode(self, rows: list[LiveRow], most_steps: int) -> None:
        """A token for each of `rows`, neighbours in depth-first order, or a stride of them."""
        parts = self._parts
        begin = parts.forwards.now()
        token_ids = np.array([r.token_ids[-1] for r in rows], np.int64)
        changes = parts.scheduler.changes
        positions, own = self._view.own(rows, changes)
        before, documents = self._view.before(rows, changes)
        if parts.forwards.runner is None or documents is not None or parts.turns is not None:
            batch = pack_decode(token_ids, positions, own, before, parts.packer, documents)
            parts.outcomes.append(rows, self._logits(rows, batch))
        else:
            spans = decode_spans(positions, own, before)
            step = DecodeStep(token_ids, positions, own[1] - 1, spans)
            self._run(rows, step, most_steps)
        parts.forwards.counters.decode_s += parts.forwards.now() - begin

    def _run(self, rows: list[LiveRow], step: DecodeStep, most_steps: int) -> None:
        """A stride of `rows`, or the one step that must be read before the next is chosen."""
        parts = self._parts
        ends = None if self._strides is None else self._strides.run(rows, step, most_steps)
        if ends is not None:
            parts.outcomes.finish(ends)
            return
        chosen = parts.forwards.recorded(step)
        parts.outcomes.append(rows, chosen.logits, chosen.greedy)

    def _logits(self, rows: list[LiveRow], batch: PackedBatch) -> Tensor:
        """Of a packed step of `rows`."""
        forwards, turns, every = self._parts.forwards, self._parts.turns, np.arange(len(rows))
        if turns is None:
            return forwards.logits(batch, every)
        with turns.watcher.watching_decode(rows) as observer:
            return forwards.logits(replace(batch, observer=observer), every)
