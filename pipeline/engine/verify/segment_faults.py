"""Faults of the kind that reuse at any position can have, planted on purpose (docs/audits.md).

| fault | what happens |
|---|---|
| offset | each document but a row's first is seen one position from where it stands |
| foreign document | a row sees another row's document instead of its last one |
| buffer place | own tokens are placed where they lie in memory, and not where they stand |
| stale rows | the soft tokens are those of another adapter |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import numpy as np

from pipeline.plan.documents import DocumentPlan

SegmentFault = Literal["offset", "foreign document", "buffer place", "stale rows"]
SEGMENT_FAULTS: Final[tuple[SegmentFault, ...]] = (
    "offset", "foreign document", "buffer place", "stale rows"
)  # fmt: skip


def spoil(plan: DocumentPlan, fault: SegmentFault) -> DocumentPlan:
    """The plan with a fault; the same one where nothing of it can have that fault."""
    return {
        "offset": _offset,
        "foreign document": _foreign_document,
        "buffer place": _buffer_place,
        "stale rows": _stale_rows,
    }[fault](plan)


def _offset(plan: DocumentPlan) -> DocumentPlan:
    is_first = np.zeros(len(plan.use_shift), bool)
    is_first[plan.use_bounds[:-1][np.diff(plan.use_bounds) > 0]] = True
    return replace(plan, use_shift=np.where(is_first, plan.use_shift, plan.use_shift - 1))


def _foreign_document(plan: DocumentPlan) -> DocumentPlan:
    last = plan.use_bounds[1:][np.diff(plan.use_bounds) > 0] - 1
    path, lengths = plan.use_path.copy(), plan.paths.lengths
    foreign = np.roll(path[last], 1)
    if plan.reuse.mode == "cacheblend":  # its copy must find room
        foreign = np.where(lengths[foreign] == lengths[path[last]], foreign, path[last])
    path[last] = foreign
    first = np.minimum(plan.use_first, plan.paths.lengths[path] - 1)
    return replace(plan, use_path=path, use_first=first)


def _buffer_place(plan: DocumentPlan) -> DocumentPlan:
    if plan.reuse.mode == "cacheblend":  # a row's copy has its slots by position
        return plan
    before = np.append(0, np.cumsum(plan.run_length))
    runs = np.diff(plan.run_bounds)
    offset = before[:-1] - np.repeat(before[plan.run_bounds[:-1]], runs)
    lengths = np.append(plan.paths.lengths, 0)  # the last one: of rows without a preamble
    return replace(plan, run_position=np.repeat(lengths[plan.preamble], runs) + offset)


def _stale_rows(plan: DocumentPlan) -> DocumentPlan:
    size = plan.reuse.vocabulary_size
    paths, own = (
        replace(table, flat=np.minimum(table.flat, size)) for table in (plan.paths, plan.own)
    )
    return replace(plan, paths=paths, own=own)
