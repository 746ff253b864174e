"""Requests that are scored come together as rows. Knows no engine and no files.

A row is there when its last request is; of a request memory holds two numbers. Of requests of one
sequence the first that waits has computed it, and pays for it; the others count it as cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.job.planning import PlannedJob
from pipeline.records import Completion, Timing
from pipeline.scoring_settings import ScoringSettings


class RowScores(NamedTuple):
    """What is known of a row's continuations, in order."""

    loglikelihoods: list[float]
    greedy: list[bool]
    token_counts: list[int]
    byte_counts: list[int]
    last_ids: list[int]


class ScoredRow(NamedTuple):
    """An input row that is done. `computed_by`: the row that computed its requests, itself where
    it computed one of them; `scores` None: it failed."""

    row: int
    completion: Completion
    computed_by: int
    scores: RowScores | None


class _Waiting:
    """What a row has got so far."""

    def __init__(self, num_requests: int) -> None:
        self.left = num_requests
        self.cached_tokens = self.stored_tokens = 0
        self.timing: Timing | None = None
        self.computed_by = -1


class ScoreCollector:
    """Of the rows that are not `done`."""

    def __init__(self, planned: PlannedJob, done: NDArray[np.bool_]) -> None:
        assert planned.requests is not None
        self._planned = planned
        self._requests = planned.requests
        self._loglikelihood = np.full(len(self._requests), np.nan)
        self._is_greedy = np.zeros(len(self._requests), bool)
        self._waiting: dict[int, _Waiting] = {}
        self._is_open = ~done
        self._is_open[list(planned.rejected)] = False

    def add(self, completion: Completion) -> Iterator[ScoredRow]:
        """The rows that a sequence's scores complete, or its failure ends."""
        scores = self._planned.plan.scores
        assert scores is not None
        low, high = scores.bounds[completion.sequence : completion.sequence + 2].tolist()
        numbers = scores.request[low:high]
        rows = self._requests.row[numbers]
        payer = -1
        for place, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            if not self._is_open[row]:
                continue
            pays, payer = payer < 0, row if payer < 0 else payer
            if completion.finish_reason == "error":
                self._is_open[row] = False
                self._waiting.pop(row, None)
                yield ScoredRow(row, self._share(completion, number, pays), payer, None)
                continue
            scored = completion.scores[place]
            self._loglikelihood[number] = math.fsum(scored.logprobs)
            self._is_greedy[number] = scored.is_greedy
            found = self._note(row, self._share(completion, number, pays), payer)
            if found is not None:
                yield found

    def _share(self, completion: Completion, number: int, pays: bool) -> Completion:
        """The completion as it counts for one of its requests."""
        if pays:
            return completion
        timing = replace(completion.timing, prefill_s=0.0, prefill_amortized_s=0.0)
        cached = int(self._planned.plan.table.lengths[number])
        return replace(completion, cached_tokens=cached, timing=timing)

    def _note(self, row: int, completion: Completion, payer: int) -> ScoredRow | None:
        waiting = self._waiting.get(row)
        if waiting is None:
            waiting = self._waiting[row] = _Waiting(len(self._requests.of_row(row)))
        waiting.left -= 1
        waiting.cached_tokens += completion.cached_tokens
        waiting.stored_tokens += completion.stored_tokens
        waiting.timing = _joined(waiting.timing, completion.timing)
        if waiting.computed_by < 0 or payer == row:
            waiting.computed_by = payer
        if waiting.left:
            return None
        del self._waiting[row]
        self._is_open[row] = False
        whole = replace(
            completion,
            cached_tokens=waiting.cached_tokens,
            stored_tokens=waiting.stored_tokens,
            timing=waiting.timing,
            prompt_tokens=self._planned.prompt_tokens(row),
            scores=(),
        )
        return ScoredRow(row, whole, waiting.computed_by, self._scores(row))

    def _scores(self, row: int) -> RowScores:
        numbers = self._requests.of_row(row)
        some = slice(numbers.start, numbers.stop)
        counts = self._planned.plan.table.lengths[some] - self._requests.contexts[some] + 1
        return RowScores(
            self._loglikelihood[some].tolist(),
            self._is_greedy[some].tolist(),
            counts.tolist(),
            self._requests.num_bytes[some].tolist(),
            self._requests.last[some].tolist(),
        )


def _joined(before: Timing | None, now: Timing) -> Timing:
    """Of several requests of one row."""
    if before is None:
        return now
    return Timing(
        queue_s=min(before.queue_s, now.queue_s),
        prefill_s=before.prefill_s + now.prefill_s,
        prefill_amortized_s=before.prefill_amortized_s + now.prefill_amortized_s,
        decode_s=0.0,
        ttft_s=max(before.ttft_s, now.ttft_s),
        latency_s=max(before.latency_s, now.latency_s),
    )


class NoLikelyChoice(ValueError):
    """Every choice has the probability 0."""


class Compared(NamedTuple):
    """What a row's scores say. `label_mass`: total probability of the choices where each is one
    token; None: some are longer."""

    best: int
    probabilities: list[float]
    label_mass: float | None


def compare(scores: RowScores, normalize: str) -> Compared | None:
    """None: every choice has the probability 0, so that none is the likeliest."""
    by = {"none": None, "tokens": scores.token_counts, "bytes": scores.byte_counts}[normalize]
    values = np.array(scores.loglikelihoods)
    if by is not None:
        values = values / np.array(by)
    best = float(values.max())
    if not math.isfinite(best):
        return None
    weights = np.exp(values - best)
    mass = None
    if set(scores.token_counts) == {1}:
        by_token = dict(zip(scores.last_ids, scores.loglikelihoods, strict=True))
        mass = min(1.0, math.fsum(map(math.exp, by_token.values())))
    return Compared(int(values.argmax()), (weights / weights.sum()).tolist(), mass)


def score_columns(
    scores: RowScores, texts: Sequence[str], cut: int, asked: ScoringSettings
) -> dict[str, object]:
    """The columns `SCORE_FIELDS` of a row with these choices; of prompts that are scored themselves
    (no texts) their perplexity. Raises NoLikelyChoice."""
    columns: dict[str, object] = {"cut_tokens": cut}
    if not texts:
        total, tokens = math.fsum(scores.loglikelihoods), sum(scores.token_counts)
        mean = -total / tokens
        return columns | {
            "loglikelihoods": [total],
            "token_counts": [tokens],
            "byte_counts": [sum(scores.byte_counts)],
            "greedy": [all(scores.greedy)],
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
        }
    found = compare(scores, asked.normalize)
    if found is None:
        raise NoLikelyChoice(
            "the model gives every choice the probability 0, so none of them is the likeliest"
        )
    return columns | {
        "choice": texts[found.best],
        "choice_index": found.best,
        "loglikelihoods": scores.loglikelihoods,
        "probabilities": found.probabilities,
        "token_counts": scores.token_counts,
        "byte_counts": scores.byte_counts,
        "greedy": scores.greedy,
        "label_mass": found.label_mass,
    }
