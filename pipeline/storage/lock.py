"""Locks that die with their owner. Knows nothing about what they guard."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from pipeline.errors import RunDirectoryError

LOCK_NAME = ".lock"
_OWNER = re.compile(r"process (\d+) on (.+)")
_logger = logging.getLogger("coppice")


def is_abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock, as far as this machine can tell. Does not touch it."""
    try:
        owner = (folder / LOCK_NAME).read_text(errors="replace").strip()
    except OSError:
        return True
    return not owner or is_dead(owner)


def own_name() -> str:
    """How this process is called in a lock."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_dead(owner: str) -> bool:
    """Whether `owner`, an `own_name`, has ended, as far as this machine can tell."""
    match = _OWNER.fullmatch(owner)
    if match is None:
        return True  # nobody's name, or half of one that a full disk cut off: its owner gave up
    if match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as somebody else's
        return False
    return False


class HeldElsewhere(Exception):
    """Somebody else holds the lock. `owner`: its `own_name`, or words for an unknown one."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class FileLock:
    """Held from construction until `release`. The operating system frees it if its owner dies.

    The file is never removed: a second process could hold the removed one and a third a new one.
    `left_behind`: the name of an owner who died with it, else the empty string.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        """Take the lock without waiting. Raises HeldElsewhere, OSError."""
        self._file = _open(path, mode)
        try:
            self.left_behind = self._take()
        except BaseException:
            os.close(self._file)
            raise

    def _take(self) -> str:
        """Lock the open file and write our name into it; return the name that was there."""
        owner = os.pread(self._file, 200, 0).decode(errors="replace").strip()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HeldElsewhere(owner or "another process") from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{own_name()}\n".encode(), 0)
        return owner

    def release(self) -> None:
        """Give the lock back; the file stays, empty unless its disk refuses."""
        try:
            with suppress(OSError):  # then the next owner says that we left it behind
                os.ftruncate(self._file, 0)
        finally:
            os.close(self._file)


def _open(path: Path, mode: int) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # a link could make us empty another file
    with suppress(FileNotFoundError):
        return os.open(path, flags)  # in a shared folder O_CREAT refuses the files of others
    file = os.open(path, flags | os.O_CREAT, mode)
    with suppress(OSError):  # not ours: another process was faster
        os.fchmod(file, mode)  # whatever the umask says
    return file


class FolderLock(FileLock):
    """One writer per folder."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises RunDirectoryError, naming the owner if somebody holds it."""
        path = folder / LOCK_NAME
        try:
            super().__init__(path)
        except HeldElsewhere as held:
            raise RunDirectoryError(
                f"{folder} is in use by {held.owner}; wait until it ends or choose another folder"
            ) from held
        except OSError as error:
            raise RunDirectoryError(
                f"cannot lock {path} ({error.strerror}); check the disk and who may write to it"
            ) from error
        if self.left_behind:
            _logger.warning(
                "took over the lock of %s, which %s left behind", folder, self.left_behind
            )
