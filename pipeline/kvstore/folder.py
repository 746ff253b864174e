"""The store's folder: names of entries, temporary files, quarantine. Knows no trees, no tensors.

```
 DIR/ab/ab12….safetensors   an entry        DIR/index.safetensors   to open fast, nothing else
 DIR/quarantine/            what was bad    DIR/.lock               of the one writer
```
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UsageError
from pipeline.private_folder import NotPrivate, check_private, private_folder, sync_folder
from pipeline.storage.durable import is_temp
from pipeline.storage.lock import LOCK_NAME
from pipeline.storage.targets import folder_to_write

INDEX_NAME = "index.safetensors"
EMBEDDINGS_NAME = "embeddings.safetensors"  # of kept prompts, for `retrieval`; no entry needs it
_QUARANTINE = "quarantine"
_SUFFIX = ".safetensors"
_SHELF = re.compile("[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")


class FileState(NamedTuple):
    """`size` in bytes, `last_used` in ns since 1970: the file's modification time."""

    size: int
    last_used: int


class StoreFolder:
    """Files of a store by name. Methods raise OSError unless they say otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_path = path / INDEX_NAME
        self.quarantine_path = path / _QUARANTINE

    @classmethod
    def open(cls, path: Path, *, create: bool) -> StoreFolder:
        """Make it if it is missing and `create`; what is there is not changed.

        Others may be able to list it, but not to look into its files: token ids are text to
        whoever has the tokenizer. Raises UsageError where it cannot be made or read, others may
        write to it, or it holds other things than a store.
        """
        try:
            if create or path.exists():
                private_folder(path)
            names = os.listdir(path)
        except NotPrivate as error:
            raise _not_private(path, error) from error
        except OSError as error:
            raise UsageError(
                f"cannot open the KV store {path} ({error.strerror}); name another folder"
            ) from error
        _check_names(path, names)
        return cls(path)

    def entry_path(self, key: str) -> Path:
        """Where the entry of this key is, or would be."""
        return self.path / key[:2] / f"{key}{_SUFFIX}"

    def list_entries(self) -> dict[str, FileState]:
        """Every file whose name is that of an entry, by key; not what vanishes meanwhile."""
        found = {}
        for item in self._shelved():
            if _ENTRY.fullmatch(item.name) and item.name[:2] == item.path.split(os.sep)[-2]:
                with suppress(FileNotFoundError):
                    state = item.stat(follow_symlinks=False)
                    key = item.name.removesuffix(_SUFFIX)
                    found[key] = FileState(state.st_size, state.st_mtime_ns)
        return found

    def make_shelf(self, key: str) -> None:
        """Make the folder of this entry, for good; never the store's own, were it deleted."""
        with suppress(FileExistsError):
            os.mkdir(self.path / key[:2], 0o700)
            sync_folder(self.path)

    def touch(self, key: str, last_used: int) -> None:
        """Set when the entry was last used, if that is possible: losing it harms little."""
        with suppress(OSError):
            os.utime(self.entry_path(key), ns=(last_used, last_used))

    def remove(self, key: str) -> None:
        """Remove an entry; it may be gone already."""
        self.drop_quarantined(self.entry_path(key))

    def quarantine(self, key: str) -> int:
        """Put an entry aside, whatever it is; returns its bytes."""
        path = self.entry_path(key)
        size = path.lstat().st_size
        with suppress(FileExistsError):
            os.mkdir(self.quarantine_path, 0o700)
        target = self.quarantine_path / f"{time.time_ns()}-{path.name}"
        os.replace(path, target)
        return size

    def list_quarantine(self) -> list[tuple[Path, FileState]]:
        """What was put aside and when, the oldest first."""
        found = []
        with suppress(OSError), os.scandir(self.quarantine_path) as items:
            for item in items:
                with suppress(OSError, ValueError):
                    moved_at = int(item.name.split("-")[0])
                    size = item.stat(follow_symlinks=False).st_size
                    found.append((Path(item.path), FileState(size, moved_at)))
        return sorted(found, key=lambda pair: pair[1].last_used)

    def drop_quarantined(self, path: Path) -> None:
        """Remove one thing that was put aside, whatever it is."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def drop_temps(self) -> int:
        """Remove what writers that died have left; only for the one writer. Returns how many."""
        temps = [Path(item.path) for item in self._shelved() if item.name.startswith(".")]
        temps = [path for path in (*temps, *self.path.iterdir()) if is_temp(path)]
        for path in temps:
            path.unlink(missing_ok=True)
        return len(temps)

    def _shelved(self) -> Iterator[os.DirEntry[str]]:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.path):
                if _SHELF.fullmatch(name):
                    with suppress(OSError), os.scandir(self.path / name) as items:
                        yield from items


def check_store(path: Path) -> None:
    """Raises UsageError where `path` could not be opened as a store; makes nothing."""
    there, why_not = folder_to_write(path)
    if why_not is not None:
        raise UsageError(f"cannot use --kv-store {path}: {why_not}; name another folder")
    if there == path.absolute():
        try:
            check_private(path.stat(), path)
        except NotPrivate as error:
            raise _not_private(path, error) from error
        _check_names(path, os.listdir(path))


def _not_private(path: Path, error: NotPrivate) -> UsageError:
    return UsageError(
        f"the KV store {path} is not used, for what others write is no KV of ours: "
        f"{error}; name a folder of your own"
    )


def _check_names(path: Path, names: list[str]) -> None:
    foreign = next((name for name in names if not _is_ours(name)), None)
    if foreign is not None:
        raise UsageError(
            f"{path} holds {foreign}, so it is no KV store; name an empty or a new folder"
        )


def _is_ours(name: str) -> bool:
    known = (INDEX_NAME, EMBEDDINGS_NAME, _QUARANTINE, LOCK_NAME, "lost+found")
    return name in known or _SHELF.fullmatch(name) is not None or is_temp(Path(name))
