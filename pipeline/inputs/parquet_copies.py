"""Parquet copies of JSON lines, JSON lists and CSV files, made once each and kept for some days.

```
 <user's cache>/coppice/inputs/<path>-<size and time>.parquet     footer: sha256 of the original
```

A copy holds what the original does, so it is its owner's alone to read. Errors, ids and the
fingerprint speak of the original.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.errors import InputError, StorageError
from pipeline.inputs.input_files import InputFile, damage_named
from pipeline.inputs.parquet_input import ORIGIN_HASH, ParquetInput
from pipeline.inputs.text_files import is_csv, write_rows
from pipeline.private_folder import private_folder, stale_in
from pipeline.storage.durable import write_whole

_VERSION = 3  # another one where the same lines would become other rows
_STALE_S = 3 * 24 * 3600  # what nobody came back for
_DIGITS = 24


class ParquetCopies:
    """The copies in one folder, which need not exist."""

    def __init__(self, folder: Path, as_text: Iterable[str] = ()) -> None:
        """`as_text`: columns of CSV files that are text whatever they hold."""
        self._folder = folder
        self._as_text = tuple(sorted(as_text))

    def reading_as_text(self, names: Iterable[str]) -> ParquetCopies:
        """The same copies, and of CSV files those with these columns as text."""
        return ParquetCopies(self._folder, names)

    def open(self, original: InputFile) -> ParquetInput:
        """`original` as a Parquet file, made anew where there is no whole copy of it as it is now.

        Raises InputError naming file and line, StorageError.
        """
        with damage_named(original.name):
            stamp = original.stamp()
        how = self._as_text if is_csv(original.base_name) else ""
        key = f"{original.home.root}:{original.path}{how}"
        copy = self._folder / f"{_short(key)}-{_short(f'{stamp} {_VERSION}')}.parquet"
        file = replace(InputFile.local(copy), name=f"the copy of {original.name}")
        try:
            private_folder(self._folder)
        except OSError as error:
            raise self._refusal(original, error) from error
        if not _is_whole(file, copy):
            self._make(original, copy)
        return replace(ParquetInput.open(file), origin=original, stamp=stamp)

    def drop_stale(self) -> None:
        """Remove copies, and what killed calls left of some, that nobody used for three days."""
        for path in stale_in(self._folder, _STALE_S):
            with suppress(OSError):
                path.unlink()

    def _make(self, original: InputFile, copy: Path) -> None:
        """Copies of what the original was before are of no use to anybody any more."""
        metadata = {ORIGIN_HASH.decode(): original.content_hash().hex()}
        try:
            for old in self._folder.glob(f"{copy.name.partition('-')[0]}-*"):
                if old != copy:  # that one may be another process's, whole by now
                    old.unlink(missing_ok=True)
            write_whole(
                copy, lambda sink: write_rows(original, sink, metadata, True, self._as_text)
            )
        except (OSError, StorageError) as error:
            raise self._refusal(original, error) from error

    def _refusal(self, original: InputFile, error: Exception) -> StorageError:
        return StorageError(
            f"cannot keep a Parquet copy of {original.name} in {self._folder} "
            f"({error.__cause__ or error}); set XDG_CACHE_HOME to a folder of your own on a disk "
            "with room, or convert the file with coppice convert"
        )


def _is_whole(file: InputFile, copy: Path) -> bool:
    """Whether the copy is there and has its end; it counts as used from now on."""
    try:
        os.utime(copy)
        ParquetInput.open(file)
    except (OSError, InputError):
        return False
    return True


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:_DIGITS]
