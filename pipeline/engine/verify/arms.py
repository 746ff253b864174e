"""The same rows computed in other ways, and how far each is from plain full prefill.

| arm | prefixes | rows at a time |
|---|---|---|
| again | computed in full, the baseline once more | one |
| batched | computed in full | all: what batching alone changes, the noise floor |
| reuse | shared | one |
| product | shared | all |

Every arm is given the tokens that the row was answered with, so that all positions can be compared;
left to themselves, two arms that part once say different things from there on. What each of them
is for stands in docs/audits.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.base import Deviation, EngineHooks, RunControl
from pipeline.engine.divergence import divergence
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.request_logits import Context
from pipeline.engine.sampler import Sampler
from pipeline.engine.verify.segment_baseline import Lengths, SegmentBaselines
from pipeline.engine.verify.stateful_baseline import EvictionBaselines
from pipeline.engine.verify.story import Story
from pipeline.engine.verify.told import told_logits
from pipeline.errors import EngineError
from pipeline.model.model import LoadedModel
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

ARMS: Final = ("again", "batched", "reuse", "product")


@dataclass(frozen=True)
class ForcedRow:
    """A row and the tokens that it is given; `params` and `noise_key` choose what it would say;
    `lengths` of its segments where documents are reused at any position; `story`, whose last answer
    are these tokens, where tokens of its conversation are given up."""

    prompt: Sequence[int]
    output: Sequence[int]
    params: SamplingParams
    noise_key: int
    lengths: Lengths = ()
    story: Story | None = None


ModeBaselines = SegmentBaselines | EvictionBaselines
"""Of runs whose rows are no plain prompts."""


def compare_arms(
    engine: PrefixEngine, rows: Sequence[ForcedRow], baselines: ModeBaselines | None = None
) -> Iterator[tuple[str, list[Deviation]]]:
    """Each arm and its deviation from the baseline, row by row. `baselines`: of the mode in which
    documents are reused, or of what is given up.

    Holds the logits of all rows at all positions twice. Raises EngineError where a row cannot run.
    """
    settings, sampler = engine.settings, Sampler(engine.loaded)
    naive = NaiveEngine(engine.loaded)

    def in_full() -> list[Tensor]:
        return [
            (naive if baselines is None else baselines.of_row(row)).forced_logits(
                row.prompt, row.output
            )
            for row in rows
        ]

    baseline, again = in_full(), in_full()
    yield "again", _deviations(sampler, rows, baseline, again)
    for name, share, max_rows in (
        ("batched", False, settings.max_rows),
        ("reuse", True, 1),
        ("product", True, settings.max_rows),
    ):
        changed = settings.model_copy(update={"max_rows": max_rows})
        arm = PrefixEngine(engine.loaded, changed, engine.backend, engine.costs)
        yield name, _deviations(sampler, rows, baseline, _computed(arm, rows, share, baselines))


def compare_weights(
    rounded: LoadedModel, unrounded: LoadedModel, rows: Sequence[ForcedRow]
) -> list[Deviation]:
    """How far a model with rounded weights is from the same one without, row by row."""
    sampler, models = Sampler(unrounded), [NaiveEngine(each) for each in (unrounded, rounded)]
    return [
        _deviation(sampler, row, *(model.forced_logits(row.prompt, row.output) for model in models))
        for row in rows
    ]


def _computed(
    arm: PrefixEngine, rows: Sequence[ForcedRow], share: bool, baselines: ModeBaselines | None
) -> list[Tensor]:
    if isinstance(baselines, EvictionBaselines):
        stories = [row.story for row in rows if row.story is not None]
        return told_logits(arm, stories, baselines.eviction, share)
    return forced_logits(arm, rows, share, None if baselines is None else baselines.reuse)


def compare_attention(baselines: ModeBaselines, rows: Sequence[ForcedRow]) -> list[Deviation]:
    """How far the mode in which documents are reused, or what was kept, is from full attention, row
    by row."""
    naive = baselines.naive
    sampler = Sampler(naive.loaded)
    return [
        _deviation(sampler, row, *(
            baseline.forced_logits(row.prompt, row.output)
            for baseline in (naive, baselines.of_row(row))
        ))
        for row in rows
    ]  # fmt: skip


def same_bits_alone(engine: PrefixEngine, rows: Sequence[ForcedRow]) -> list[bool]:
    """[rows] whether all logits, with reuse and in a batch, have the bits of the row run alone.

    That is what strict mode promises. Raises EngineError where a row cannot run.
    """
    together = forced_logits(engine, rows, share=True)
    alone = (forced_logits(engine, [row], share=False)[0] for row in rows)
    return [torch.equal(*pair) for pair in zip(together, alone, strict=True)]


def forced_logits(
    engine: PrefixEngine, rows: Sequence[ForcedRow], share: bool, reuse: Reuse | None = None
) -> list[Tensor]:
    """The logits that choose each token of each row's output: [rows][n, V], model's dtype.

    Without `share` every row is a tenant of its own. Raises EngineError where a row cannot run.
    """
    plan = _plan(rows, share, engine.loaded.shape.vocabulary_size, reuse)
    row_of = plan.sequences.row.tolist()
    seen: list[list[Tensor]] = [[] for _ in rows]

    def record(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        for sequence, position, row_logits in zip(sequences, positions, logits, strict=True):
            if position == len(seen[row_of[sequence]]):  # a row that was preempted comes again
                seen[row_of[sequence]].append(row_logits.clone())

    def given(sequences: list[int], positions: list[int]) -> list[int]:
        pairs = zip(sequences, positions, strict=True)
        return [rows[row_of[sequence]].output[position] for sequence, position in pairs]

    every, hooks = np.arange(len(plan.sequences)), EngineHooks(record, given)
    for done in engine.generate(plan, every, RunControl(), hooks):
        if done.error_type:
            raise EngineError(f"a row of the audit cannot run: {done.error_message}")
    return [torch.stack(logits) for logits in seen]


def _plan(
    rows: Sequence[ForcedRow], share: bool, vocabulary_size: int, reuse: Reuse | None
) -> Plan:
    """One sequence a row, also where prompts are equal: seeds tell them apart."""
    params = tuple(
        SamplingParams(max_new_tokens=len(row.output), seed=index, ignore_eos=True)
        for index, row in enumerate(rows)
    )
    table = TokenTable.from_lists([list(row.prompt) for row in rows], vocabulary_size)
    indices = np.arange(len(rows))
    tenants = np.zeros(len(rows), np.int64) if share else indices
    plan = build_plan(table, [str(index) for index in indices], params, indices, tenants)
    if reuse is None:
        return plan
    return with_documents(plan, Segments.from_lists([row.lengths for row in rows]), reuse, tenants)


def _deviations(
    sampler: Sampler, rows: Sequence[ForcedRow], baseline: Sequence[Tensor], other: Sequence[Tensor]
) -> list[Deviation]:
    return [_deviation(sampler, *each) for each in zip(rows, baseline, other, strict=True)]


def _deviation(sampler: Sampler, row: ForcedRow, baseline: Tensor, other: Tensor) -> Deviation:
    """`baseline`, `other`: logits [n, V]."""
    indices = np.arange(len(row.output))
    keys = np.full(len(indices), row.noise_key, np.uint64)
    params = [row.params] * len(indices)
    said, says = (
        sampler.sample(
            x.float(), params, keys, indices, lambda i: Context(row.prompt, row.output[:i])
        )
        for x in (baseline, other)
    )
    expected, found = (torch.log_softmax(x.double(), -1) for x in (baseline, other))
    best = expected.topk(2).indices
    gap = (expected - found).gather(1, best)
    return Deviation(
        (said.token_ids != says.token_ids) | ~says.is_finite,
        divergence(expected, found).cpu().numpy(),
        (gap[:, 0] - gap[:, 1]).abs().cpu().numpy(),
    )
