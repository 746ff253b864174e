"""A disk whose n-th operation fails, by patching the calls that `durable` makes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

OPERATIONS = ("open", "write", "fsync", "replace")


class FailingDisk:
    """Counts the operations and fails number `fail_at` (from 0); None: only counts.

    A failing write first writes half of what it was given, as a full disk does.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int | None, code: int) -> None:
        self.calls: list[str] = []
        self._fail_at, self._code = fail_at, code
        for name in OPERATIONS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(self._code, os.strerror(self._code))
            return real(*args, **kwargs)

        return call


CODES = [errno.ENOSPC, errno.EIO]
