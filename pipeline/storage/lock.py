"""Locks that die with their owner. Knows nothing about what they guard."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from pipeline.errors import FolderInUse, RunDirectoryError

LOCK_NAME = ".lock"
_TRIES = 5
_LOOK_S = 0.02
_OWNER = re.compile(r"process (\d+) on (.+)")
_logger = logging.getLogger("coppice")


def is_abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock, as far as this machine can tell."""
    owner = _read_owner(folder / LOCK_NAME)
    return (not owner or is_dead(owner)) and not _is_locked(folder)


def _read_owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _is_locked(folder: Path) -> bool:
    """Whether somebody holds the folder itself, whatever became of the file in it."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(file)


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

    We never remove the file: a second process could hold the removed one and a third a new one.
    `left_behind`: the name of an owner who died with it, else the empty string.
    """

    def __init__(self, path: Path, mode: int = 0o600, group: int | None = None) -> None:
        """Take the lock without waiting. Raises HeldElsewhere, OSError.

        `mode` and `group` are of a file that is made; one that is there stays as it is.
        """
        self._path = path
        for _ in range(_TRIES):
            self._file = _open(path, mode, group)
            try:
                self.left_behind = self._take()
                if self.is_held:
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # it was removed meanwhile: others lock another one
        raise OSError(errno.ESTALE, "somebody keeps removing it")

    @property
    def is_held(self) -> bool:
        """Whether what has the file's name now is the file that was locked."""
        return _is_at(self._path, self._file)

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


def _open(path: Path, mode: int, group: int | None) -> int:
    """The lock's file, made if it is missing. Raises OSError, also for one with a second name."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # a link could make us empty another file
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            file = os.open(path, flags)  # in a shared folder O_CREAT refuses the files of others
            state = os.fstat(file)
            if stat.S_ISREG(state.st_mode) and state.st_nlink <= 1:
                return file
            os.close(file)
            raise OSError(errno.EMLINK, "it is a link to another file")
        with suppress(FileExistsError):  # another process was faster
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
            with suppress(OSError):  # a group that we are not in, a disk that has no modes
                if group is not None:
                    os.fchown(file, -1, group)
                os.fchmod(file, mode)  # whatever the umask says
            return file
    raise OSError(errno.ESTALE, "somebody keeps removing it")


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file or folder is still what has this name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except OSError:
        return False


class FolderLock:
    """One writer per folder: the folder itself is locked, and a file in it says by whom.

    The file can be removed by anybody, the folder not while it is in use. On a file system that
    cannot lock folders (NFS) the file is the lock alone.
    """

    def __init__(self, folder: Path, is_shared: bool = False) -> None:
        """Take the lock. Raises FolderInUse, naming who holds it, and RunDirectoryError.

        `is_shared`: whoever may write to the folder may take its lock.
        """
        path = folder / LOCK_NAME
        self._path = folder.absolute()
        try:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _lock_folder(self._folder, path)
                state = os.fstat(self._folder)
                mode = 0o600 | (state.st_mode & 0o066 if is_shared else 0)
                self._lock = FileLock(path, mode, state.st_gid if is_shared else None)
            except BaseException:
                os.close(self._folder)
                raise
        except HeldElsewhere as held:
            raise FolderInUse(
                f"{folder} is in use by {held.owner}; wait until it ends or choose another folder",
                held.owner,
            ) from held
        except OSError as error:
            raise RunDirectoryError(
                f"cannot lock {path} ({error.strerror}); check the disk and who may write to it"
            ) from error
        if self._lock.left_behind:
            _logger.warning(
                "took over the lock of %s, which %s left behind", folder, self._lock.left_behind
            )

    @property
    def is_held(self) -> bool:
        """Whether what has the folder's name now is the folder that was locked."""
        return _is_at(self._path, self._folder)

    def release(self) -> None:
        """Give the lock back."""
        try:
            self._lock.release()
        finally:
            os.close(self._folder)


def _lock_folder(folder: int, path: Path) -> None:
    """Lock an open folder, where that can be had. Raises HeldElsewhere."""
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(path)
            if not left or (owner and not is_dead(owner)):
                raise HeldElsewhere(owner or "another process") from error
            time.sleep(_LOOK_S)  # perhaps somebody only asks whether it is locked
        except OSError:
            return
        else:
            return
