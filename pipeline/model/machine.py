"""What this machine is, in words that name measured or compiled things, and where they are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.private_folder import NotPrivate, private_folder


def cache_folder() -> Path:
    """The user's own folder for what can be made again. It need not exist.

    A user without a home, as in many containers, has one among the temporary files.
    """
    said = os.environ.get("XDG_CACHE_HOME")
    if said:
        return Path(said) / "coppice"
    try:
        return Path.home() / ".cache" / "coppice"
    except RuntimeError:
        return own_temporary_folder()


def own_temporary_folder() -> Path:
    """A folder among the temporary files that nobody else may write to, made where it is missing.

    Raises UsageError if somebody else made it.
    """
    folder = Path(tempfile.gettempdir()) / f"coppice-{os.getuid()}"
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link; set XDG_CACHE_HOME to a folder of your own")
    try:
        return private_folder(folder)
    except NotPrivate as error:
        raise UsageError(f"{error}; set XDG_CACHE_HOME to a folder of your own") from None


def private_cache(name: str) -> Path:
    """A folder of the user's cache, made where it is missing; nobody else may write to it.

    Raises NotPrivate if somebody else could have put something there; OSError.
    """
    return private_folder(cache_folder() / name)


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
