"""Prepared rows of a large input, kept on disk until the plan is made: a killed plan goes on.

One that only looks, before a job of the same rows, may leave them to it.

```
 <user's cache>/coppice/plans/<key>/   tokens.bin               token ids, appended
                                       rows-00000.parquet ..    what the plan needs of each row
                                       state.json               how much of these counts: last
```

The key stands for all that the rows depend on; another input, tokenizer or setting has another one.
The files hold token ids, ids of rows and sampling fields, no text; the user alone may read them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import polars as pl

from pipeline.errors import RunDirectoryError
from pipeline.model.machine import private_cache
from pipeline.private_folder import NotPrivate, private_folder, stale_in
from pipeline.storage.durable import replace_file, write_errors
from pipeline.storage.lock import FolderLock
from pipeline.storage.part_file import encode_parquet

_STALE_S = 7 * 24 * 3600  # what nobody came back for
_logger = logging.getLogger("coppice")


class Checkpoint:
    """The folder of one key, held by this process. Files of it are the user's alone.

    `every_rows`: so many are committed at a time; a job of no more needs none.
    """

    every_rows: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        """Take the folder, made when absent. Raises RunDirectoryError if it is in use, OSError."""
        self._folder = private_folder(folder)
        self._lock = FolderLock(folder)
        try:
            self.state = self._read_state()
            self.tokens = self._open_tokens()
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def open(cls, key: str) -> Checkpoint | None:
        """None where it cannot be had: another process has it, or the cache is read-only."""
        try:
            plans = private_cache("plans")
            for left in stale_in(plans, _STALE_S):
                shutil.rmtree(left, ignore_errors=True)
            return cls(plans / key)
        except NotPrivate as error:
            _logger.warning("the plan is not kept while it is made: %s", error)
        except (RunDirectoryError, OSError):
            pass
        return None

    def frames(self) -> Iterator[pl.DataFrame]:
        """The committed rows, in order."""
        for number in range(self.state.get("parts", 0)):
            yield pl.read_parquet(self._part(number), glob=False)

    def save(self, frame: pl.DataFrame, state: dict[str, Any]) -> None:
        """Commit the tokens written so far, these rows, and `state`. Raises StorageError."""
        number = self.state.get("parts", 0)
        with write_errors(self._folder):
            self.tokens.flush()
            os.fsync(self.tokens.fileno())
        replace_file(self._part(number), memoryview(encode_parquet(frame.to_arrow())))
        self.state = state | {"parts": number + 1, "token_bytes": self.tokens.tell()}
        replace_file(self._folder / "state.json", json.dumps(self.state).encode())

    def remove(self) -> None:
        """The files go; what is open or mapped lives until it is closed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()

    def leave(self) -> None:
        """Leave the folder, with every row saved, to others; its files may still be read here."""
        self._lock.release()

    def release(self) -> None:
        """Leave the folder to others; nothing that was not saved is written after that."""
        with suppress(OSError):  # a disk that is full; the file is closed all the same
            self.tokens.close()
        self._lock.release()

    def _read_state(self) -> dict[str, Any]:
        """Of the last commit; empty where there is none, or where one of its files is damaged."""
        try:
            state: dict[str, Any] = json.loads((self._folder / "state.json").read_bytes())
            rows = sum(
                int(pl.scan_parquet(self._part(n), glob=False).select(pl.len()).collect().item())
                for n in range(state["parts"])
            )
            whole = (self._folder / "tokens.bin").stat().st_size >= state["token_bytes"]
            return state if whole and rows == state["rows"] else {}
        except (OSError, ValueError, KeyError, pl.exceptions.PolarsError):
            return {}

    def _open_tokens(self) -> BinaryIO:
        path = self._folder / "tokens.bin"
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        try:
            file.truncate(self.state.get("token_bytes", 0))
            file.seek(0, os.SEEK_END)
        except BaseException:
            file.close()
            raise
        return file

    def _part(self, number: int) -> Path:
        return self._folder / f"rows-{number:05}.parquet"
