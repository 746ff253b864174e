"""A disk that is watched: every call that changes it is numbered, and can fail or kill.

Watches what Python asks of `os` in one folder; `os.fdopen` gives files that write through `os`.
Polars and pyarrow write nothing by themselves in a job, which `test_sweep` checks.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

PATH_CALLS = ("open", "mkdir", "unlink", "rmdir", "replace", "rename", "link", "truncate")
FILE_CALLS = ("write", "pwrite", "fsync", "ftruncate", "copy_file_range")
WRITES = ("write", "pwrite", "copy_file_range")
CODES = (errno.ENOSPC, errno.EIO)
When = Literal["before", "halfway", "after"]


class Operation(NamedTuple):
    """One call. `path` is relative to the watched folder; `arguments` are those of the call."""

    name: str
    path: str
    arguments: tuple[Any, ...]


class WatchedDisk:
    """Counts the operations in `root` while `patch` lasts. Subclasses do more than count."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.operations: list[Operation] = []
        self.real = {name: getattr(os, name) for name in (*PATH_CALLS, *FILE_CALLS)}
        self._root = os.path.realpath(root)
        self._lock = threading.Lock()
        for name in (*PATH_CALLS, *FILE_CALLS):
            patch.setattr(os, name, self._watch(name))
        patch.setattr(os, "fdopen", lambda file, mode: io.BufferedRandom(_Raw(file, mode)))

    def perform(self, number: int, operation: Operation, call: Callable[..., Any]) -> Any:
        """Do the operation."""
        return call()

    def _watch(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*arguments: Any, **options: Any) -> Any:
            place = _place_of(name, arguments, options)
            if not f"{place}/".startswith(f"{self._root}/"):
                return real(*arguments, **options)
            operation = Operation(name, place[len(self._root) + 1 :], arguments)
            with self._lock:
                number = len(self.operations)
                self.operations.append(operation)
            return self.perform(number, operation, lambda: real(*arguments, **options))

        return call


class FailingDisk(WatchedDisk):
    """Operation `fail_at` fails with `code`, and with `lasts` every later one that needs room.

    A failing write first writes half of what it was given, as a full disk does.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        root: Path,
        fail_at: int,
        code: int,
        lasts: bool = False,
    ) -> None:
        self._fail_at, self._code, self._lasts = fail_at, code, lasts
        super().__init__(patch, root)

    def perform(self, number: int, operation: Operation, call: Callable[..., Any]) -> Any:
        """Do the operation, or half of it and raise."""
        is_hit = number == self._fail_at
        is_hit |= self._lasts and number > self._fail_at and needs_room(operation)
        if not is_hit:
            return call()
        if operation.name in WRITES:
            write_half(self.real[operation.name], operation)
        raise OSError(self._code, os.strerror(self._code))


class DeadlyDisk(WatchedDisk):
    """Ends the process, as SIGKILL does, before, halfway through or after an operation."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, kill_at: int, when: When) -> None:
        self._kill_at, self._when = kill_at, when
        super().__init__(patch, root)

    def perform(self, number: int, operation: Operation, call: Callable[..., Any]) -> Any:
        """Do the operation, unless it is the last."""
        if number != self._kill_at:
            return call()
        try:
            if self._when == "after":
                call()
            if self._when == "halfway" and operation.name in WRITES:
                write_half(self.real[operation.name], operation)
        finally:
            os._exit(KILLED)


KILLED = 137


def needs_room(operation: Operation) -> bool:
    """Whether a full disk refuses it."""
    creates = operation.name == "open" and bool(operation.arguments[1] & os.O_CREAT)
    return creates or operation.name in (*WRITES, "mkdir", "link")


def write_half(write: Callable[..., int], operation: Operation) -> None:
    """Write the first half of what the call was given."""
    if operation.name == "copy_file_range":
        source, target, _ = operation.arguments
        write(source, target, os.fstat(source).st_size // 2)
        return
    file, content, *rest = operation.arguments
    write(file, bytes(content)[: len(content) // 2], *rest)


class _Raw(io.FileIO):
    """A file whose writing calls can be seen."""

    def write(self, content: Any) -> int:
        return os.write(self.fileno(), content)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self.fileno(), size)
        return size


def _place_of(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The absolute path that a call works on; the second one where there are two."""
    two = ("replace", "rename", "link", "copy_file_range")
    target = arguments[1] if name in two else arguments[0]
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    folder = options.get("dir_fd")
    above = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.normpath(os.path.join(above, os.fspath(target)))
