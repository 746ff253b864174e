"""The recorded decode steps of one engine, kept from one job to the next.

A recorded step holds addresses: of the weights, and of the KV arena. So the arena is kept as well,
as long as it is no large part of the device's memory, and the next job that it is large enough for
gets it back, with everything recorded. One job at a time has it; a second one beside it gets an
arena and a runner of its own.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from pipeline.engine.backend import Backend
from pipeline.engine.cuda_graphs import DecodeRunner, Recorder
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kv_cache import KVCache, kv_capacity, reserve_kv
from pipeline.engine.memory import release_cached, total_memory
from pipeline.engine.packing import PackedBatch
from pipeline.engine.step_memory import Replay
from pipeline.errors import EngineError
from pipeline.model.model import LoadedModel

_KEPT_SHARE = 0.25  # of the device's memory: the most that an idle engine holds for the next job
_PROBED_BYTES = 1 << 20


class CudaRecorder:
    """Records CUDA graphs; all share one pool of memory, since only one runs at a time.

    A step that waits for the device cannot be recorded. It is run once with waiting forbidden, so
    that it fails as any call does: a recording that breaks off half way leaves its stream current
    and the allocator in its pool (pytorch #180395).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_checked = False
        self._begin_anew()

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Nothing runs while it is recorded. Raises RuntimeError where it cannot be, EngineError
        where the device cannot be used after that."""
        if not self._is_checked:
            _run_without_waiting(work)
            self._is_checked = True
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            self._recover(error)
            raise
        return graph.replay

    def _begin_anew(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def _recover(self, error: RuntimeError) -> None:
        """Bring the allocator back out of the pool, and try whether it works."""
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(_index(self._device), self._pool)
        self._begin_anew()
        try:
            torch.cuda.synchronize(self._device)
            torch.empty(_PROBED_BYTES, dtype=torch.uint8, device=self._device).zero_()
            torch.cuda.empty_cache()
            torch.cuda.synchronize(self._device)
        except RuntimeError as lost:
            raise EngineError(
                f"recording a step failed ({_first_line(error)}), and the device cannot be used "
                f"after it ({_first_line(lost)}): start again with --kernels torch"
            ) from error


class Recordings:
    """Gives jobs their KV memory, and what decodes over it."""

    def __init__(
        self,
        backend: Backend,
        kernel: TritonKernel,
        device: torch.device,
        notes: list[str],
    ) -> None:
        """`notes` gets a sentence where recording fails."""
        self._backend: Final = backend
        self._kernel: Final = kernel
        self._device: Final = device
        self._notes: Final = notes
        self._arena: Tensor | None = None
        self._runner: DecodeRunner | None = None
        self._lent: weakref.ref[KVCache] | None = None

    @classmethod
    def of(cls, backend: Backend, device: torch.device, notes: list[str]) -> Recordings | None:
        """Of a backend whose steps can be recorded, else none."""
        kernel = backend.recordable
        return None if kernel is None else cls(backend, kernel, device, notes)

    def reserve(
        self, shape: tuple[int, int, int], needed: int, budget: int | None, like: Tensor
    ) -> tuple[KVCache, DecodeRunner]:
        """A cache of `needed` slots, or what `budget` bytes or memory allow, and the runner of its
        steps. See `kv_capacity` and `reserve_kv`."""
        bytes_per_token = 2 * math.prod(shape) * like.element_size()
        if self._lent is not None and self._lent() is not None:
            capacity = kv_capacity(budget, bytes_per_token, needed, self._device)
            return self._reserve_anew(shape, capacity, like)
        wanted = needed if budget is None else min(needed, budget // bytes_per_token)
        if self._arena is None or not _holds(self._arena, shape, wanted, like):
            self._arena = self._runner = None
            release_cached(self._device)
            capacity = kv_capacity(budget, bytes_per_token, needed, self._device)
            cache, runner = self._reserve_anew(shape, capacity, like)
            if cache.arena.nbytes > total_memory(self._device) * _KEPT_SHARE:
                return cache, runner
            self._arena, self._runner = cache.arena, runner
        assert self._runner is not None
        cache = KVCache(shape, 0, like, self._arena)
        self._lent = weakref.ref(cache)
        return cache, self._runner

    def _reserve_anew(
        self, shape: tuple[int, int, int], capacity: int, like: Tensor
    ) -> tuple[KVCache, DecodeRunner]:
        cache = reserve_kv(shape, capacity, like)
        return cache, self._runner_over(cache.arena)

    def describe(self) -> dict[str, int]:
        """How many sizes of steps are known, and how many of them are recorded."""
        return {} if self._runner is None else self._runner.describe()

    def _runner_over(self, arena: Tensor) -> DecodeRunner:
        layers, _, kv_heads, slots, head_dim = arena.shape
        cache = KVCache((layers, kv_heads, head_dim), slots - 1, arena, arena)

        def forward(batch: PackedBatch) -> Tensor:
            every = torch.arange(len(batch.slots), device=self._device)
            return self._backend.forward(batch, cache, every)

        record = choose_recorder(self._device)
        return DecodeRunner(forward, self._kernel, cache.capacity, record, self._notes)


def choose_recorder(device: torch.device) -> Recorder | None:
    """CUDA graphs on a CUDA device, else none."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _holds(arena: Tensor, shape: tuple[int, int, int], capacity: int, like: Tensor) -> bool:
    layers, kv_heads, head_dim = shape
    is_same_kind = arena.dtype == like.dtype and arena.device == like.device
    sizes = arena.shape[:3] == (layers, 2, kv_heads) and arena.shape[4] == head_dim
    return is_same_kind and sizes and arena.shape[3] > capacity


def _run_without_waiting(work: Callable[[], None]) -> None:
    """Raises RuntimeError where the work would wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def reserve(
    recordings: Recordings | None, loaded: LoadedModel, budget: int | None, needed: int
) -> tuple[KVCache, DecodeRunner | None]:
    """KV memory for `needed` tokens, or what there is, and the runner that decodes over it."""
    weight = next(loaded.model.parameters())
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    if recordings is not None:
        return recordings.reserve(shape, needed, budget, weight)
    bytes_per_token = loaded.shape.kv_bytes_per_token(str(weight.dtype).removeprefix("torch."))
    capacity = kv_capacity(budget, bytes_per_token, needed, loaded.device)
    return reserve_kv(shape, capacity, like=weight), None
