"""The engine with a fault of the kind that reuse can have, planted on purpose (docs/audits.md).

What it writes goes through the audit like any other answer; an audit that lets it pass proves
nothing. The faults, all at one prompt position `at` of a shared prefix:

| fault | what happens |
|---|---|
| position | everything behind `at` is computed one position further on |
| foreign key | the keys at `at` are those of another place, in all layers |
| bit flip | the highest bit of the exponent of one value at `at` is flipped, in one layer |
| first token | the prompt's first token is missing |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.base import RunControl
from pipeline.engine.forward import Forward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.segment_baseline import Lengths
from pipeline.engine.verify.segment_faults import SegmentFault, spoil
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenTable
from pipeline.records import Completion, SamplingParams

Fault = Literal["position", "foreign key", "bit flip", "first token"]
FAULTS: Final[tuple[Fault, ...]] = ("position", "foreign key", "bit flip", "first token")

_INTEGERS = {2: torch.int16, 4: torch.int32}


def write_segments_with_fault(
    engine: PrefixEngine,
    rows: Sequence[tuple[Sequence[int], Lengths]],
    reuse: Reuse,
    max_new_tokens: int,
    fault: SegmentFault | None,
) -> list[Completion]:
    """As `write_with_fault`, of prompts with the lengths of their segments."""
    plan = _plan([prompt for prompt, _ in rows], engine, max_new_tokens)
    segments = Segments.from_lists([lengths for _, lengths in rows])
    plan = with_documents(plan, segments, reuse, np.zeros(len(rows), np.int64))
    if fault is not None:
        assert plan.documents is not None
        plan = replace(plan, documents=spoil(plan.documents, fault))
    return _write(engine, plan)


def write_with_fault(
    engine: PrefixEngine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    fault: Fault | None,
    at: int,
) -> list[Completion]:
    """Greedy answers to `prompts`, [prompts], by `engine` with `fault` (None: as it is)."""
    given = [prompt[1:] for prompt in prompts] if fault == "first token" else prompts
    backend = engine.backend
    if fault is not None:
        backend = replace(backend, forward=FaultyForward(backend.forward, fault, at))
    writer = PrefixEngine(engine.loaded, engine.settings, backend, engine.costs)
    return _write(writer, _plan(given, engine, max_new_tokens))


def _plan(prompts: Sequence[Sequence[int]], engine: PrefixEngine, max_new_tokens: int) -> Plan:
    indices = np.arange(len(prompts))
    params = tuple(
        SamplingParams(max_new_tokens=max_new_tokens, seed=index) for index in indices.tolist()
    )
    size = engine.loaded.shape.vocabulary_size
    table = TokenTable.from_lists([list(prompt) for prompt in prompts], size)
    return build_plan(table, [str(index) for index in indices], params, indices)


def _write(engine: PrefixEngine, plan: Plan) -> list[Completion]:
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), RunControl()))
    return sorted(done, key=lambda completion: int(plan.sequences.row[completion.sequence]))


class FaultyForward:
    """Another forward, spoilt. KV is spoilt once, behind the forward that wrote position `at`."""

    def __init__(self, forward: Forward, fault: Fault, at: int) -> None:
        self.name = forward.name
        self._forward = forward
        self._fault = fault
        self._at = at
        self._is_done = False

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        if self._fault == "position":
            later = batch.position_ids > self._at
            batch = replace(batch, position_ids=batch.position_ids + later)
        logits = self._forward(batch, cache, keep)
        slots = batch.slots[batch.position_ids[0] == self._at]
        if len(slots) and not self._is_done:
            self._is_done = True
            self._spoil(cache, int(slots[0]), int(batch.slots[-1]))
        return logits

    def _spoil(self, cache: KVCache, slot: int, other: int) -> None:
        if self._fault == "foreign key":
            cache.arena[:, 0, :, slot] = cache.arena[:, 0, :, other]
        if self._fault == "bit flip":
            layer = len(cache.arena) // 2
            bits = cache.arena[layer, 1, 0, slot].view(_INTEGERS[cache.arena.element_size()])
            bits[0] ^= 1 << (8 * cache.arena.element_size() - 2)
