"""What this machine is, in words that name measured or compiled things, and where they are kept."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.private_folder import private_folder


def cache_folder() -> Path:
    """The user's own folder for what can be made again. It need not exist."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "coppice"


def private_cache(name: str) -> Path:
    """A folder of the user's cache, made where it is missing; nobody else may write to it.

    Raises NotPrivate if somebody else could have put something there; OSError.
    """
    return private_folder(cache_folder() / name)


def cpu_description() -> str:
    """Name and features of the CPU where the system tells them, else the empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    starts = ("model name", "flags", "Features")
    return "\n".join(next((x for x in lines if x.startswith(start)), "") for start in starts)
