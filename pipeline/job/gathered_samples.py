"""Samples of a row wait for each other: a row is written when all of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.job.answer_table import Answered, answer_of
from pipeline.job.planning import PlannedJob
from pipeline.records import Completion


class GatheredSamples:
    """Those of rows some of whose samples are missing."""

    def __init__(self, planned: PlannedJob) -> None:
        self._samples = planned.samples
        self._waiting: dict[int, dict[int, Completion]] = {}

    def add(self, completion: Completion) -> tuple[Completion, ...]:
        """All samples of the row, in order, where this was the last that was missing."""
        if not self._samples.are_several:
            return (completion,)
        first = self._samples.first(completion.sequence)
        found = self._waiting.setdefault(first, {})
        found[completion.sequence] = completion
        if len(found) < self._samples.count(first):
            return ()
        del self._waiting[first]
        return tuple(found[sequence] for sequence in sorted(found))


def joined(row: int, samples: Sequence[Completion], prompt_tokens: int) -> Answered:
    """A row of several samples: an error where one of them is, else as the first of them.

    Its prompt counts once: what its samples have from each other was not cached before it. Where
    they were computed on several devices, more than the prompt was computed, and that is less than
    nothing. Its latency is that of the last sample.
    """
    failed = next((sample for sample in samples if answer_of(sample) is None), None)
    if failed is not None:
        return Answered(row, replace(failed, sequence=samples[0].sequence))
    shared = (len(samples) - 1) * prompt_tokens
    first = replace(
        samples[0],
        cached_tokens=sum(sample.cached_tokens for sample in samples) - shared,
        stored_tokens=max(sample.stored_tokens for sample in samples),
        timing=replace(
            samples[0].timing, latency_s=max(sample.timing.latency_s for sample in samples)
        ),
    )
    return Answered(row, first, samples=(first, *samples[1:]))
