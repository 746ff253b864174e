"""The baseline of rows that see documents at any position: their mode, slowly, and nothing shared.

An audit of such a run asks two things. Is the mode computed right? That is asked of
`SegmentBaseline`. How far is the mode from full attention? That is asked of the honest baseline of
all runs, `NaiveEngine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import Replay
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.soft_rows import add_soft_rows
from pipeline.engine.verify.segment_reference import SegmentReference
from pipeline.plan.documents import Reuse
from pipeline.records import SamplingParams

Lengths = Sequence[int]
"""Tokens of a prompt's preamble, of each of its documents, and of its question."""


class HasLengths(Protocol):
    """A row that knows how its prompt is cut."""

    @property
    def lengths(self) -> Lengths: ...


class SegmentBaseline:
    """`Baseline` of prompts that are all cut as `lengths` says."""

    def __init__(self, naive: NaiveEngine, reference: SegmentReference, lengths: Lengths) -> None:
        self._naive = naive
        self._reference = reference
        self._lengths = lengths

    def replay(
        self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, noise_key: int
    ) -> Replay:
        logits = self.forced_logits(prompt, output)
        return self._naive.judge(logits, prompt, output, params, noise_key)

    def forced_logits(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """See `NaiveEngine.forced_logits`."""
        return self._reference.forced_logits(cut(prompt, self._lengths), list(output))

    def generate_one(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Each token by a whole new run."""
        writer, segments = self._naive.writer(prompt, params), cut(prompt, self._lengths)
        while not writer.is_over:
            writer.choose(self._reference.forced_logits(segments, [*writer.output, 0])[-1])
        return tuple(writer.output)


class SegmentBaselines:
    """Makes them for rows of one run, whose mode is `reuse`."""

    def __init__(
        self, naive: NaiveEngine, reuse: Reuse, soft_rows: NDArray[np.float32] | None = None
    ) -> None:
        """`soft_rows` [R, hidden] of an adapter, which the model of `naive` then knows as well."""
        if soft_rows is not None:
            add_soft_rows(naive.loaded.model, soft_rows, reuse.vocabulary_size)
        self.naive = naive
        self.reuse = reuse
        self._reference = SegmentReference(naive.loaded.model, reuse)

    def of_row(self, row: HasLengths) -> SegmentBaseline:
        """Of an audited row."""
        return self.of(row.lengths)

    def of(self, lengths: Lengths) -> SegmentBaseline:
        return SegmentBaseline(self.naive, self._reference, lengths)


def cut(prompt: Sequence[int], lengths: Lengths) -> list[NDArray[np.int64]]:
    """The ids of each segment."""
    return np.split(np.asarray(prompt, np.int64), np.cumsum(lengths)[:-1])
