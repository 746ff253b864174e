"""What this machine is, in words that name measured or compiled things, and where they are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's own folder for what can be made again. It need not exist."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "coppice"


def num_threads() -> int:
    """Threads that a matrix product is computed by in this process."""
    import torch  # seconds; not before somebody asks

    return int(torch.get_num_threads())


def cpu_description() -> str:
    """Name and features of the CPU where the system tells them, else the empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    starts = ("model name", "flags", "Features")
    return "\n".join(next((x for x in lines if x.startswith(start)), "") for start in starts)
