"""What the host does for a decode step, measured beside a device that does nothing.

A replay starts nothing here, and what it would have chosen lies there already. So all time that
passes is the engine's own: growth, planning, what is sent, and what is made of the tokens. It needs
no card, but the processor of the machine that has one counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.child import Bench
from benchmarks.gpu.workload import DRY_WORKLOAD, WORKLOAD, load_random
from benchmarks.prompts import shared_prompts
from pipeline.engine import recordings
from pipeline.engine.backend import Backend
from pipeline.engine.base import RunControl
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings

HEADS = (32, 8)
_PROGRAMS = 528  # as on an H100
_TOKEN, _TOKENS = 5, 64
_FEW, _MANY = 33, 257
_TRIES = 3
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(ignore_eos=True),
    "stop strings": SamplingParams(ignore_eos=True, stop=("never",)),
    "min_tokens, step by step": SamplingParams(ignore_eos=True, asked='{"min_tokens":100000}'),
}


class Idle:
    """The model: says one token at once, whatever it is given; it writes and reads no KV."""

    name = "idle"

    def __init__(self, rows: int) -> None:
        self._logits = torch.zeros(2 * rows, _TOKENS)
        self._logits[:, _TOKEN] = 1.0

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        return self._logits[: len(keep)]


def _record(work: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


class IdleDevice:
    """An engine over it, and plans for it. One thread alone should compute."""

    def __init__(self, rows: int = 256) -> None:
        self.rows = rows
        loaded = load_random("tiny", torch.device("cpu"))
        self._vocabulary = loaded.shape.vocabulary_size
        kernel = TritonKernel(*HEADS, torch.device("cpu"))
        kernel._programs, kernel.items_aimed_at = _PROGRAMS, -(-_PROGRAMS // HEADS[1])
        backend = Backend(Idle(rows), kernel, recordable=kernel)
        settings = EngineSettings(max_rows=rows, max_batch_tokens=1 << 16, threads=1)
        self.engine = PrefixEngine(loaded, settings, backend)

    def plan(self, params: tuple[SamplingParams, ...]) -> Plan:
        """Rows below one prefix, which take turns in having these parameters."""
        prompts = shared_prompts(self.rows, 500, 32, self._vocabulary)
        table = TokenTable.from_lists(prompts, self._vocabulary)
        ids = [str(i) for i in range(self.rows)]
        return build_plan(table, ids, params, np.arange(self.rows) % len(params))

    def generate(self, plan: Plan) -> None:
        with mock.patch.object(recordings, "choose_recorder", lambda device: _record):
            for done in self.engine.generate(plan, np.arange(self.rows), RunControl()):
                if done.error_type is not None:
                    raise RuntimeError(f"row {done.sequence}: {done.error_message}")

    def seconds(self, *params: SamplingParams) -> float:
        """Of this process's own time, for a job."""
        plan = self.plan(params)
        begin = time.process_time()
        self.generate(plan)
        return time.process_time() - begin

    def steady_s(self, params: SamplingParams) -> float:
        """Host seconds of a step in which all rows live: the least of some tries, by two jobs that
        differ in their steps alone."""
        few, many = (_lasting(params, count) for count in (_FEW, _MANY))
        self.seconds(many)
        times = [(self.seconds(many), self.seconds(few)) for _ in range(_TRIES)]
        long, short = map(min, zip(*times, strict=True))
        return (long - short) / (_MANY - _FEW)

    def ending_s(self) -> float:
        """Host seconds of a step where rows end one after the other, prefill left out."""
        spread = tuple(_lasting(KINDS["greedy"], count) for count in range(64, 193))
        once = tuple(_lasting(KINDS["greedy"], 2) for _ in spread)
        self.seconds(*spread)
        times = [(self.seconds(*spread), self.seconds(*once)) for _ in range(_TRIES)]
        long, short = map(min, zip(*times, strict=True))
        return (long - short) / 190

    def steady_calls(self, params: SamplingParams) -> float:
        """Calls of Python functions and of C's in a steady step: a count that no load changes."""
        counts = []
        for length in (_FEW, _MANY):
            plan = self.plan((_lasting(params, length),))
            with counted_calls() as count:
                self.generate(plan)
            counts.append(count[0])
        return (counts[1] - counts[0]) / (_MANY - _FEW)


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many calls begin within, once it is over."""
    count = [0]

    def note(frame: FrameType, event: str, argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield count
    finally:
        sys.setprofile(before)


def host(bench: Bench, argument: str) -> None:
    """Milliseconds of the host for a step of 256 rows, by what the rows ask for."""
    device = IdleDevice((DRY_WORKLOAD if bench.is_dry else WORKLOAD).rows)
    for name, params in KINDS.items():
        bench.say(rows=device.rows, asks=name, ms=1e3 * device.steady_s(params))
    bench.say(rows=device.rows, asks="greedy, ends one by one", ms=1e3 * device.ending_s())


def _lasting(params: SamplingParams, count: int) -> SamplingParams:
    return replace(params, max_new_tokens=count)
