"""A decode step of the whole model, by recording and without; its kernels; choosing tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.ceilings import measure_card
from benchmarks.gpu.child import Bench
from benchmarks.gpu.layer import setting_of
from benchmarks.gpu.roofline import Card, byte_floor_s, step_floor_s
from benchmarks.gpu.timing import host_seconds, seconds_of_replay, wait
from benchmarks.gpu.workload import (
    DRY_PREFIXES,
    DRY_WORKLOAD,
    PREFIXES,
    WORKLOAD,
    Workload,
    random_cache,
)
from pipeline.engine.cuda_graphs import DecodeRunner, Recorder
from pipeline.engine.forward import Forward, TransformersForward
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.packing import PackedBatch
from pipeline.engine.recordings import choose_recorder
from pipeline.engine.sampling import sample_next_token
from pipeline.engine.step_memory import DecodeStep
from pipeline.engine.triton_forward import TritonForward
from pipeline.model.model import LoadedModel
from pipeline.records import SamplingParams

_PROFILED_PREFIX = 2048
_KERNELS_TOLD = 24
_LAWS = {
    "greedy": SamplingParams(max_new_tokens=1),
    "temperature": SamplingParams(max_new_tokens=1, temperature=0.8),
    "top-k 50, top-p 0.9": SamplingParams(max_new_tokens=1, temperature=0.8, top_p=0.9, top_k=50),
}


class Stepper:
    """Decodes the step in the middle of a job, over KV of random numbers."""

    def __init__(self, loaded: LoadedModel, workload: Workload, prefix: int) -> None:
        self.device = loaded.device
        self.step: DecodeStep = workload.half_way(prefix)
        self._scratch = workload.live_tokens(prefix)
        self._cache = random_cache(loaded, self._scratch + 1, loaded.shape.num_layers)
        self.forwards: dict[str, Forward] = {
            "": TritonForward(loaded.model),
            "unfused_": TransformersForward(loaded.model, pack_weights=False),
        }
        heads = loaded.model.config.num_attention_heads
        self.kernel = TritonKernel(heads, loaded.shape.num_kv_heads, self.device)

    def runner(self, record: Recorder | None, arm: str = "") -> DecodeRunner:
        """`arm` is one of `forwards`."""
        forward = self.forwards[arm]

        def logits(batch: PackedBatch) -> Tensor:
            every = torch.arange(len(batch.slots), device=self.device)
            return forward(batch, self._cache, every)

        return DecodeRunner(logits, self.kernel, self._scratch, record)


def step(bench: Bench, shape: str) -> None:
    """For growing prefixes: from numpy arrays to numpy token ids, planning included."""
    loaded, card = bench.model(shape), measure_card(bench)
    workload = DRY_WORKLOAD if bench.is_dry else WORKLOAD
    for prefix in DRY_PREFIXES if bench.is_dry else PREFIXES:
        if bench.left_s < 25:
            bench.say(prefix=prefix, skipped="no time is left")
            return
        stepper = Stepper(loaded, workload, prefix)
        bench.say(prefix=prefix, **_measure(stepper, card, loaded, workload, prefix))
        if prefix == _PROFILED_PREFIX:
            bench.say(prefix=prefix, **_kernels(stepper))
        del stepper
        bench.free()


def _measure(
    stepper: Stepper, card: Card, loaded: LoadedModel, workload: Workload, prefix: int
) -> dict[str, Any]:
    given, device = stepper.step, stepper.device
    recorded, plain = stepper.runner(choose_recorder(device)), stepper.runner(None)
    unfused = stepper.runner(choose_recorder(device), "unfused_")
    seconds = host_seconds(lambda: recorded(given), device)
    unfused_s = host_seconds(lambda: unfused(given), device)
    setting = setting_of(loaded, workload, prefix)
    floor = step_floor_s(setting.dimensions, setting.rows, card)
    bytes_s = byte_floor_s(setting.dimensions, setting.rows, card)
    on_device, unfused_on_device = (
        next((seconds_of_replay(r, device) for r in runner.replays()), None)
        for runner in (recorded, unfused)
    )
    return {
        "step_s": seconds,
        "device_s": on_device,
        "unfused_step_s": unfused_s,
        "unfused_device_s": unfused_on_device,
        "without_graphs_s": host_seconds(lambda: plain(given), device, 5),
        "plan_s": host_seconds(lambda: stepper.kernel.plan(given.spans, given.positions), device),
        "floor_s": floor,
        "byte_floor_s": bytes_s,
        "share_of_floor": floor / seconds,
        "same_tokens": _tokens(recorded, given) == _tokens(plain, given),
        "same_tokens_unfused": _tokens(recorded, given) == _tokens(unfused, given),
        "is_recording": recorded.is_recording,
    }


def _tokens(runner: DecodeRunner, step: DecodeStep) -> list[int]:
    tokens: list[int] = runner(step).greedy.token_ids.tolist()
    return tokens


def _kernels(stepper: Stepper) -> dict[str, Any]:
    """What one replay starts, the dearest first: where a step misses its floor, the reason."""
    from torch.profiler import ProfilerActivity, profile

    runner = stepper.runner(choose_recorder(stepper.device))
    for _ in range(3):
        runner(stepper.step)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        runner(stepper.step)
        wait(stepper.device)
    rows = [(e.key[:60], e.count, round(e.device_time_total, 1)) for e in profiled.key_averages()]
    rows.sort(key=lambda row: -row[2])
    return {
        "kernels": sum(count for _, count, _ in rows),
        "busy_us": sum(us for _, _, us in rows),
        "dearest": rows[:_KERNELS_TOLD],
    }


def sampled(bench: Bench, argument: str) -> None:
    """Choosing the tokens of 256 rows out of logits that fall as a language model's do."""
    rows, vocabulary = (4, 2000) if bench.is_dry else (256, 128_256)
    rank = torch.rand(rows, vocabulary, device=bench.device).argsort(-1) + 1
    logits = 12 - 1.4 * rank.float().log()
    keys, positions = np.arange(rows, dtype=np.uint64), np.zeros(rows, np.int64)
    for name, law in _LAWS.items():
        seconds = host_seconds(
            partial(sample_next_token, logits, [law] * rows, keys, positions),
            bench.device, 10,
        )  # fmt: skip
        bench.say(law=name, ms=1e3 * seconds)
