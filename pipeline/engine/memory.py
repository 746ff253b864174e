"""How much memory there is, and what "out of memory" looks like on each device."""

from __future__ import annotations

import psutil
import torch

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "std::bad_alloc")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed: less work may succeed where this did not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in _CPU_MESSAGES)


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for later, so that a smaller attempt finds all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
