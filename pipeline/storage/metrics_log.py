"""metrics.jsonl: how fast a run is, a line every so often. Knows nothing about who writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from typing_extensions import TypedDict

from pipeline.storage.durable import write_all, write_errors
from pipeline.storage.json_file import JsonFile, Number

METRICS_NAME: Final = "metrics.jsonl"
_LONGEST_LINE: Final = 1 << 16  # bytes


class _Line(TypedDict, total=False):
    at: str
    rows_per_s: Number | None
    prefill_tokens_per_s: Number | None
    decode_tokens_per_s: Number | None


_LINE: Final = JsonFile(_Line, METRICS_NAME, "delete it, it only says how fast the run was")


def append_metrics(root: Path, record: dict[str, Any]) -> None:
    """Add one line. Raises StorageError."""
    path = root / METRICS_NAME
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with write_errors(path):
        file = os.open(path, flags, 0o600)
        try:
            _drop_torn_line(file)
            write_all(file, line.encode())
        finally:
            os.close(file)


def last_metrics(root: Path) -> dict[str, Any]:
    """The last line that is whole, for one may be written just now; empty if there is none.

    Raises RunDirectoryError if it is not what a line should be.
    """
    lines = (_LINE.content(root) or b"").split(b"\n")[:-1]
    return _LINE.parse(lines[-1], root) if lines else {}


def _drop_torn_line(file: int) -> None:
    """Cut off what follows the last whole line: a session that died wrote it."""
    size = os.fstat(file).st_size
    tail = os.pread(file, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn:
        os.ftruncate(file, size - torn)
