"""How much memory there is, and what "out of memory" looks like on each device."""

from __future__ import annotations

import ctypes

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_KEPT = 2**25  # the most that glibc takes; larger blocks are mapped and unmapped
_MESSAGES = (
    "can't allocate memory", "not enough memory", "std::bad_alloc",  # of a CPU
    "out of memory",  # of CUDA's driver, by torch or Triton
    "_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",  # of cuBLAS and its kin, at first use
)  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_memory(device: torch.device) -> int:
    """Bytes that `device` has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed: less work may succeed where this did not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in _MESSAGES)


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for later, so that a smaller attempt finds all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_pages() -> None:
    """Let malloc keep what it frees, for the whole process; does nothing where it is not glibc's.

    By default a large block goes back to the system, so that each layer of a forward pays for new
    pages: 7 % of a job of 256 rows (LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
