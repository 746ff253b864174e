"""Files that are old or new after a crash, never half. Knows nothing about what they hold.

```
 write_new(temp)  O_EXCL, 0600, all bytes, fsync ─► publish(temp, path)  rename, fsync the folder
```
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StorageError
from pipeline.private_folder import sync_folder

_AT_A_TIME = 1 << 30
_CHUNK = 4 << 20
_NO_RANGES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
_TEMP_NAME = re.compile(r"\..+\.\d+\.tmp")


def temp_path(path: Path) -> Path:
    """Where to write `path` before it is published: hidden, in its folder, a new name each time.

    A process id would do until the next one has the same: in a container every job is process 1.
    """
    return path.with_name(f".{path.name}.{secrets.randbits(48)}.tmp")


def is_temp(path: Path) -> bool:
    """Whether the name is one that `temp_path` makes."""
    return _TEMP_NAME.fullmatch(path.name) is not None


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names `path`, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({error.strerror or error}); "
            "free or repair the disk, then run the same command again"
        ) from error


def write_new(path: Path, content: bytes | memoryview) -> None:
    """Write a file that must not exist yet and flush it to the disk. Raises OSError."""
    write_stream(path, [content])


def write_stream(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o600) -> None:
    """As `write_new`, of chunks that need not be in memory together. The umask limits `mode`."""
    file = _open_new(path, mode)
    try:
        for chunk in chunks:
            write_all(file, chunk)
        os.fsync(file)
    finally:
        os.close(file)


def copy_file(source: Path, path: Path, mode: int) -> None:
    """Copy what `source` is or links to, as `write_stream`; by reference where the disk can."""
    target = _open_new(path, mode)
    try:
        with source.open("rb", buffering=0) as file:
            _copy(file.fileno(), target)
        os.fsync(target)
    finally:
        os.close(target)


def _open_new(path: Path, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def _copy(source: int, target: int) -> None:
    try:
        while os.copy_file_range(source, target, _AT_A_TIME):
            pass
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _NO_RANGES:
            raise
    while chunk := os.read(source, _CHUNK):  # the rest, or all where the kernel cannot
        write_all(target, chunk)


def write_all(file: int, content: bytes | memoryview) -> None:
    """Write all of `content` to a file descriptor, however little one call takes."""
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def publish(temp: Path, path: Path) -> None:
    """Give `temp` its final name, replacing what is there, for good. Raises OSError."""
    os.replace(temp, path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for good. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path` in one step; missing folders are made. Raises StorageError."""
    temp = temp_path(path)
    with write_errors(path):
        make_folder(path.parent)
        try:
            write_new(temp, content)
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], int]) -> int:
    """Put at `path` what `write` streams, whole or not at all; missing folders are made.

    Returns what `write` does. Raises StorageError, and what `write` raises.
    """
    path = path.absolute()
    temp = temp_path(path)
    with write_errors(path):
        make_folder(path.parent)
        try:
            with os.fdopen(_open_new(temp, 0o600), "wb") as file:
                result = write(file)
                file.flush()
                os.fsync(file.fileno())
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    return result
