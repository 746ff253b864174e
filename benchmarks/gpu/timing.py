"""Seconds on the device's own clock.

A kernel of 30 µs cannot be timed by the host's: what it takes to start one is as long. So calls are
recorded into one CUDA graph and timed by two events around its replay. Each call should touch
memory that the one before has driven out of the cache, or what is timed is the cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

_ROUNDS = 5
_CACHES_FULL = 3  # times the L2 cache that a rotation should fill
_AT_LEAST_S = 2e-3  # of a replay: an event's clock is good for half a microsecond


def seconds_a_call(calls: Sequence[Call], device: torch.device) -> float:
    """Median seconds of one of `calls`, which are the same work on different memory."""
    if device.type != "cuda":
        return _once(calls[0])
    for call in calls[:2]:
        call()
    wait(device)
    once = _timed(_graph(calls, 1), len(calls))
    repeats = max(1, math.ceil(_AT_LEAST_S / max(once * len(calls), 1e-9)))
    return _timed(_graph(calls, min(repeats, 64)), len(calls) * min(repeats, 64))


def seconds_of_replay(replay: Call, device: torch.device) -> float:
    """Median seconds on the device of what `replay` starts."""
    if device.type != "cuda":
        return _once(replay)
    return _timed(replay, 1)


def host_seconds(work: Call, device: torch.device, tries: int = 20) -> float:
    """Median seconds on the host's clock, the device idle before and after: a whole step."""
    if device.type != "cuda":
        return _once(work)
    times = []
    for _ in range(3 + tries):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def rotation(bytes_each: int, device: torch.device, most: int = 8) -> int:
    """How many copies of so many bytes outgrow the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, math.ceil(_CACHES_FULL * cache / bytes_each) + 1))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(call: Call) -> float:
    """In a rehearsal, where no figure means anything."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _graph(calls: Sequence[Call], repeats: int) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph.replay


def _timed(replay: Call, calls: int) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[1:])
