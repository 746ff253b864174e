"""Results that outlive a process, by a hash of what was asked: one SQLite file in a folder.

A result is committed two seconds after it came at the latest, and SQLite's own journal keeps the
file whole where the process or the machine dies meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError

_FILE = "results.sqlite"
_COMMIT_EVERY_S = 2.0
_AT_ONCE = 500  # keys in a question; SQLite allows 999 in its oldest versions
_WAIT_S = 60.0  # for another process that writes


class KeptResults:
    """`identity`: all that decides a result besides what is asked. Raises StorageError."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._path = folder / _FILE
        self._hash = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=20)
        self._committed_at = time.monotonic()
        with self._naming_faults():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self._path, timeout=_WAIT_S)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, result TEXT NOT NULL) "
                "WITHOUT ROWID"
            )
            self._file.commit()

    def key(self, *parts: bytes) -> bytes:
        """Of what is asked: other parts, or the same cut elsewhere, give another key."""
        digest = self._hash.copy()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def find(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """What is there of these."""
        found: dict[bytes, str] = {}
        wanted = list(dict.fromkeys(keys))
        with self._naming_faults():
            for low in range(0, len(wanted), _AT_ONCE):
                some = wanted[low : low + _AT_ONCE]
                marks = ",".join("?" * len(some))
                question = f"SELECT key, result FROM results WHERE key IN ({marks})"
                found.update(self._file.execute(question, some))
        return found

    def keep(self, key: bytes, result: str) -> None:
        """Add it, or replace what is there; committed soon."""
        with self._naming_faults():
            self._file.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, result))
        if time.monotonic() - self._committed_at > _COMMIT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Commit what was kept."""
        with self._naming_faults():
            self._file.commit()
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Commit and let go of the file."""
        self.flush()
        self._file.close()

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"results cannot be kept in {self._path} ({error}); choose another cache_dir, or "
                "remove the file if it is damaged"
            ) from error
