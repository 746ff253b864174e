"""Decoding: a token for every live row, in steps of as many rows as memory allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from torch import Tensor

from pipeline.engine.cuda_graphs import DecodeStep
from pipeline.engine.decode_view import DecodeView
from pipeline.engine.live import LiveRow
from pipeline.engine.packing import PackedBatch, decode_spans, pack_decode
from pipeline.engine.policy import DepthFirstPolicy
from pipeline.engine.run_parts import RunParts


class Decoding:
    """The answers of one run."""

    def __init__(self, parts: RunParts, policy: DepthFirstPolicy, most_rows: int) -> None:
        """`most_rows`: of a forward; fewer, once memory has ended with so many."""
        self._parts: Final = parts
        self._policy: Final = policy
        self._most_rows = most_rows
        self._view: Final = DecodeView()

    def step(self) -> None:
        """One more token for every live row that keeps its place."""
        parts = self._parts
        if parts.turns is not None:
            parts.turns.evictions.make_room(parts.scheduler.decoding())
        parts.scheduler.grow()
        rows = parts.scheduler.decoding()
        while rows:
            width = self._most_rows
            try:
                self._decode(rows[:width])
            except (MemoryError, RuntimeError) as error:
                if parts.forwards.can_halve(error, len(rows[:width])):
                    self._most_rows = len(rows[:width]) // 2
                    self._policy.halve()
                    continue
                parts.outcomes.lose(rows[0], error)
            rows = rows[width:]

    def _decode(self, rows: list[LiveRow]) -> None:
        """One forward: a token for each of `rows`, neighbours in depth-first order."""
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
            chosen = parts.forwards.recorded(step)
            parts.outcomes.append(rows, chosen.logits, chosen.greedy)
        parts.forwards.counters.decode_s += parts.forwards.now() - begin

    def _logits(self, rows: list[LiveRow], batch: PackedBatch) -> Tensor:
        """Of a packed step of `rows`."""
        forwards, turns, every = self._parts.forwards, self._parts.turns, np.arange(len(rows))
        if turns is None:
            return forwards.logits(batch, every)
        with turns.watcher.watching_decode(rows) as observer:
            return forwards.logits(replace(batch, observer=observer), every)
