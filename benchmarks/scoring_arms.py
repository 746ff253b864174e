"""Who scores requests in `benchmarks.scoring`: ours, and the backends of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from lm_eval.models.huggingface import HFLM

from benchmarks.launcher import ask_script
from benchmarks.scoring_tasks import Task
from benchmarks.setup import Setup
from kvcoppice.evaluation.evaluator import Evaluator, Request
from pipeline.job.observer import Observer
from pipeline.settings import JobSettings

Score = tuple[float, bool]
_TRIED_REQUESTS = 32  # by `hf`, with each size of a batch


@dataclass(frozen=True)
class Scores:
    """`computed`: tokens that went through the model, padding included; `positions`: of which the
    head was computed."""

    seconds: float
    computed: int
    positions: int
    scores: list[Score]


class Arm(Protocol):
    def score(self, requests: Sequence[Request]) -> Scores:
        """From ids in memory to scores there, with cold caches."""
        ...


class Ours:
    """What the model `coppice` of the harness calls: planned and computed, self-test before."""

    def __init__(self, setup: Setup) -> None:
        flat = {"model": setup.model(), "dtype": setup.dtype, "device": "cpu"}
        settings = JobSettings.from_flat(flat | {"busy_device": "share"})
        self._size = setup.vocabulary_size
        self._evaluator = Evaluator(settings, Observer())

    def score(self, requests: Sequence[Request]) -> Scores:
        """Asserts that every distinct token was computed once, and read where it must be."""
        begin = time.perf_counter()
        found = dict(self._evaluator.scores(requests, self._size))
        seconds, counts = time.perf_counter() - begin, self._evaluator.counts
        assert counts.computed_tokens == counts.unique_tokens, counts
        assert counts.positions_read == count_points(requests), counts
        assert self._evaluator.engine.counters.recomputed_tokens == 0
        scores = [(sum(found[i].logprobs), found[i].is_greedy) for i in range(len(requests))]
        return Scores(seconds, counts.computed_tokens, counts.positions_read, scores)

    @property
    def peak_kv_mb(self) -> float:
        """Of the last call."""
        return self._evaluator.engine.counters.peak_kv_bytes / 1e6


class Counting(HFLM):  # type: ignore[misc]
    """The harness's `hf` model, which counts what it feeds."""

    fed = 0

    def _model_call(self, inps: Any, *arguments: Any, **named: Any) -> Any:
        self.fed += inps.numel()
        return super()._model_call(inps, *arguments, **named)


class Theirs:
    """The harness's `hf` model, with the fastest of some sizes of a batch for each task."""

    def __init__(self, setup: Setup, batches: Sequence[int]) -> None:
        self._batches = batches
        self._chosen: dict[int, int] = {}
        self._model = Counting(
            pretrained=setup.model(), dtype=setup.dtype, device="cpu", batch_size=1
        )

    def score(self, requests: Sequence[Request]) -> Scores:
        """The size of a batch is tried before the time begins."""
        asked = [(("", ""), r.context.tolist(), r.continuation.tolist()) for r in requests]
        if id(requests) not in self._chosen:
            self._chosen[id(requests)] = self._fastest(asked[:_TRIED_REQUESTS])
        self._model.batch_size_per_gpu = self._chosen[id(requests)]
        seconds = self._time(asked)
        return Scores(seconds, self._model.fed, self._model.fed, self._found)

    def batch_of(self, requests: Sequence[Request]) -> int:
        """The size that was chosen."""
        return self._chosen[id(requests)]

    def _fastest(self, some: list[Any]) -> int:
        taken = {}
        for batch in self._batches:
            self._model.batch_size_per_gpu = batch
            taken[batch] = self._time(some)
        return min(taken, key=lambda batch: taken[batch])

    def _time(self, asked: list[Any]) -> float:
        self._model.fed = 0
        begin = time.perf_counter()
        self._found = self._model._loglikelihood_tokens(asked, disable_tqdm=True)
        return time.perf_counter() - begin


def ask_vllm(setup: Setup, tasks: Sequence[Task], cache_gib: int) -> dict[str, dict[str, Any]]:
    """By task what vLLM answers, in a process of its own; a task without an answer is left out, and
    `failure` says why. All cores are its own, which is not how it comes."""
    job: dict[str, Any] = {
        "model": setup.model(), "dtype": setup.dtype, "cache_gib": cache_gib,
        "warm_up": list(range(11, 43)),
        "tasks": {t.name: [[r.context.tolist(), r.continuation.tolist()] for r in t.requests]
                  for t in tasks},
    }  # fmt: skip
    said, failure = ask_script("vllm_scores", job, "vllm_all_cores", setup.time_limit_s)
    lines = said.splitlines()
    found: dict[str, dict[str, Any]] = {} if failure is None else {"failure": {"said": failure}}
    return found | {line["task"]: line for line in map(json.loads, lines)}


def count_points(requests: Sequence[Request]) -> int:
    """Positions that are read, counted without a plan: distinct beginnings of what is fed that end
    at the context's last token or later."""
    beginnings = set()
    for r in requests:
        fed = np.concatenate([r.context, r.continuation[:-1]])
        for end in range(
            len(r.context), len(fed) + 1
        ):  # digests: whole ones are most of the memory
            beginnings.add(hashlib.blake2b(fed[:end].tobytes(), digest_size=16).digest())
    return len(beginnings)
