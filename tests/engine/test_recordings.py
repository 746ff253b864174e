"""What an engine keeps between jobs, and what a recording that fails leaves behind.

Neither needs a card: recorded steps are direct calls here, and CUDA is a stand-in that behaves as
torch does (`torch.cuda.graph` leaves its stream current where the end of a recording fails).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import kv_cache, recordings
from pipeline.engine.backend import Backend
from pipeline.engine.base import RunControl
from pipeline.engine.forward import TransformersForward
from pipeline.engine.memory import is_exhausted
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.recordings import CudaRecorder
from pipeline.errors import EngineError
from pipeline.plan.plan import Plan
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_cuda_graphs import DirectCall
from tests.engine.test_paged_rows import ItemsByReference

CPU = torch.device("cpu")
Tokens = dict[int, tuple[int, ...]]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> DirectCall:
    """What every runner records with."""
    direct = DirectCall()
    monkeypatch.setattr(recordings, "choose_recorder", lambda device: direct)
    return direct


def recording_engine() -> PrefixEngine:
    loaded = tiny.load_tiny()
    kernel = ItemsByReference(4, 2, CPU)
    forward = TransformersForward(loaded.model, pack_weights=False)
    return PrefixEngine(loaded, EngineSettings(), Backend(forward, kernel, recordable=kernel))


def plan_of(rows: int, seed: int = 0) -> Plan:
    prompts = tiny.random_prompts(random.Random(seed), rows)
    return tiny.plan_of(prompts, (SamplingParams(max_new_tokens=6, ignore_eos=True),))


def answers(engine: Any, plan: Plan) -> Tokens:
    every = np.arange(len(plan.sequences))
    return {c.sequence: c.token_ids for c in engine.generate(plan, every, RunControl())}


def test_the_second_job_of_an_engine_records_nothing(recorder: DirectCall) -> None:
    """Seen red: a new runner, and everything recorded again, in every `generate`."""
    engine, plan = recording_engine(), plan_of(9)
    first = answers(engine, plan)
    recorded = recorder.num_recorded
    assert recorded > 0
    assert answers(engine, plan) == first == answers(NaiveEngine(tiny.load_tiny()), plan)
    smaller = plan_of(5, seed=1)
    assert answers(engine, smaller) == answers(NaiveEngine(tiny.load_tiny()), smaller)
    assert engine.recordings is not None
    assert engine.recordings.describe()["recorded"] == recorder.num_recorded <= recorded + 1


def test_a_larger_job_gets_larger_memory_and_records_anew(recorder: DirectCall) -> None:
    engine, small, large = recording_engine(), plan_of(3), plan_of(14)
    answers(engine, small)
    recorded = recorder.num_recorded
    expected = answers(NaiveEngine(tiny.load_tiny()), large)
    assert answers(engine, large) == expected and recorder.num_recorded > recorded
    recorded = recorder.num_recorded
    assert answers(engine, large) == expected and recorder.num_recorded == recorded


def test_two_jobs_at_a_time_do_not_share_their_memory(recorder: DirectCall) -> None:
    engine, one, two = recording_engine(), plan_of(8), plan_of(8, seed=2)
    answers(engine, one)
    running = engine.generate(one, np.arange(len(one.sequences)), RunControl())
    begun = next(running)
    beside = answers(engine, two)
    whole = {c.sequence: c.token_ids for c in [begun, *running]}
    naive = NaiveEngine(tiny.load_tiny())
    assert beside == answers(naive, two) and whole == answers(naive, one)


def test_an_idle_engine_holds_no_large_part_of_the_devices_memory(
    recorder: DirectCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plan = recording_engine(), plan_of(9)
    size = []
    reserve = kv_cache.reserve_kv
    monkeypatch.setattr(recordings, "reserve_kv", lambda *x: size.append(reserve(*x)) or size[-1])
    answers(engine, plan)
    monkeypatch.setattr(recordings, "total_memory", lambda device: size[0].arena.nbytes * 3)
    fresh = recording_engine()
    answers(fresh, plan)
    assert fresh.recordings is not None and engine.recordings is not None
    assert engine.recordings._arena is not None and fresh.recordings._arena is None


class StandIn:
    """torch.cuda, as far as a recorder uses it. `current` is the current stream."""

    def __init__(self) -> None:
        self.current = "default"
        self.capturing = False
        self.modes: list[str] = []
        self.ended_pools: list[Any] = []
        self.sync_mode: int | str = 0
        self.is_lost = False
        self.graphs: list[dict[str, Any]] = []
        self.pools = 0

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    def set_mode(self, mode: Any) -> None:
        self.sync_mode = mode

    def graph(self, graph: Any, **options: Any) -> Any:
        cuda = self

        class Capture:
            def __enter__(self) -> None:
                cuda.graphs.append(options)
                cuda.capturing, cuda.current = True, options["stream"]

            def __exit__(self, kind: Any, *rest: Any) -> None:
                cuda.capturing = False
                if kind is not None:  # torch: `capture_end` raises before the stream is put back
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.current = "default"

        return Capture()

    def wait(self, *args: Any) -> None:
        """What `tensor.item()` would do."""
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    graph = SimpleNamespace(replay=lambda: None)
    for name, value in {
        "graph_pool_handle": stand_in.pool,
        "Stream": lambda device=None: "recording",
        "CUDAGraph": lambda: graph,
        "current_stream": lambda device=None: stand_in.current,
        "set_stream": lambda stream: setattr(stand_in, "current", stream),
        "graph": stand_in.graph,
        "get_sync_debug_mode": lambda: stand_in.sync_mode,
        "set_sync_debug_mode": stand_in.set_mode,
        "synchronize": stand_in.wait,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    end = lambda device, pool: stand_in.ended_pools.append(pool)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    yield stand_in


def test_a_step_that_waits_is_refused_before_anything_is_recorded(cuda: StandIn) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaRecorder(CPU)(cuda.wait)
    assert cuda.graphs == [] and cuda.sync_mode == 0 and cuda.current == "default"


def test_other_threads_may_use_the_device_while_a_step_is_recorded(cuda: StandIn) -> None:
    """Seen red: the global mode, in which any call of another thread breaks a recording."""
    record = CudaRecorder(CPU)
    for _ in range(2):
        record(lambda: None)()
    assert [options["capture_error_mode"] for options in cuda.graphs] == ["thread_local"] * 2
    assert {options["pool"] for options in cuda.graphs} == {1}


def waits_when_recorded(cuda: StandIn) -> Callable[[], None]:
    """As a first use of cuBLAS does, which no call before has shown."""
    return lambda: cuda.wait() if cuda.capturing else None


def test_a_recording_that_fails_half_way_gives_stream_and_pool_back(cuda: StandIn) -> None:
    """Seen red: the recording's stream stayed current, and memory came from the graphs' pool."""
    record = CudaRecorder(CPU)
    with pytest.raises(RuntimeError, match="during capture"):
        record(waits_when_recorded(cuda))
    assert cuda.current == "default" and cuda.ended_pools == [1]
    record(lambda: None)
    assert cuda.graphs[-1]["pool"] == 2, "the pool of a failed recording is used again"


def test_a_device_that_a_failed_recording_breaks_is_an_error_that_says_so(cuda: StandIn) -> None:
    record = CudaRecorder(CPU)
    cuda.is_lost = True
    with pytest.raises(EngineError, match="illegal memory access.*--kernels torch"):
        record(waits_when_recorded(cuda))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_ends_within_a_library_of_cuda_is_recognised(message: str) -> None:
    """Seen red: only torch's own allocator was believed, and such a job ended."""
    assert is_exhausted(RuntimeError(message))
    assert not is_exhausted(RuntimeError("out of resource: shared memory"))
