"""What this machine is, in words that name measured or compiled things, and where they are kept."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UsageError


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
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder} is not yours alone; set XDG_CACHE_HOME to a folder that is")
    return folder


def cpu_description() -> str:
    """Name and features of the CPU where the system tells them, else the empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    starts = ("model name", "flags", "Features")
    return "\n".join(next((x for x in lines if x.startswith(start)), "") for start in starts)
