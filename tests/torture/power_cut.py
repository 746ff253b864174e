"""What a disk holds after the power goes: what was flushed, and of the rest nothing or anything.

```
 file   write ─► in memory ─► fsync of the file ─► its bytes last       else: empty, half, whole
 name   create, rename, unlink ─► fsync of its folder ─► it lasts       else: as before or after
```
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.torture.disk import Operation, WatchedDisk

FOLDERS = ("mkdir", "rmdir", "unlink", "replace", "rename")


@dataclass
class _File:
    """`kept`: what was flushed."""

    content: bytes = b""
    kept: bytes = b""


@dataclass
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    kept: dict[str, _File | _Folder] = field(default_factory=dict)


Step = Callable[[_Folder], None]


class RecordedDisk(WatchedDisk):
    """Notes what each operation changed, so that a power cut after any of them can be played."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.steps: list[Step] = []
        self._order = threading.RLock()
        super().__init__(patch, root)

    def perform(self, number: int, operation: Operation, call: Callable[..., Any]) -> Any:
        """Do the operation and note it; one at a time, so that the order is the true one."""
        with self._order:
            result = call()
            self._note(operation, result)
            return result

    def _note(self, operation: Operation, result: Any) -> None:
        name, path = operation.name, operation.path
        if path.endswith(" (deleted)"):
            return
        if name in FOLDERS:
            source = operation.arguments[0] if name in ("replace", "rename") else ""
            old = os.path.join(os.path.dirname(path), os.path.basename(source))
            self.steps.append(lambda root: _rename(root, name, old, path))
            return
        file = result if name == "open" else operation.arguments[0]
        if os.path.isdir(f"/proc/self/fd/{file}"):
            if name == "fsync":
                self.steps.append(lambda root: _keep_names(root, path))
            return
        content = Path(f"/proc/self/fd/{file}").read_bytes()
        self.steps.append(lambda root: _write(root, path, content, name == "fsync"))


def cut(steps: list[Step], target: Path, luck: random.Random | None) -> None:
    """Make `target` what is left after these steps. Without luck all that was not flushed is lost;
    with it each name and each file is lost, kept, or half written."""
    root = _Folder()
    for step in steps:
        step(root)
    _restore(root, target, luck)


def _restore(folder: _Folder, target: Path, luck: random.Random | None) -> None:
    target.mkdir(exist_ok=True)
    for name in sorted(folder.names.keys() | folder.kept.keys()):
        is_kept = luck is None or luck.random() < 0.5
        entry = (folder.kept if is_kept else folder.names).get(name)
        if isinstance(entry, _Folder):
            _restore(entry, target / name, luck)
        elif entry is not None:
            halves = (entry.kept, entry.content, entry.content[: len(entry.content) // 2])
            is_flushed = luck is None or entry.kept == entry.content
            content = entry.kept if is_flushed or luck is None else luck.choice(halves)
            (target / name).write_bytes(content)


def _folder(root: _Folder, path: str) -> _Folder:
    found: _File | _Folder = root
    for name in Path(path).parts:
        assert isinstance(found, _Folder)
        found = found.names[name]
    assert isinstance(found, _Folder), path
    return found


def _rename(root: _Folder, name: str, old: str, path: str) -> None:
    names = _folder(root, os.path.dirname(path)).names
    place = os.path.basename(path)
    if name == "mkdir":
        names[place] = _Folder()
    elif name in ("unlink", "rmdir"):
        names.pop(place, None)
    else:
        names[place] = names.pop(os.path.basename(old))


def _keep_names(root: _Folder, path: str) -> None:
    folder = _folder(root, path)
    folder.kept = dict(folder.names)


def _write(root: _Folder, path: str, content: bytes, is_flushed: bool) -> None:
    names = _folder(root, os.path.dirname(path)).names
    file = names.setdefault(os.path.basename(path), _File())
    assert isinstance(file, _File), path
    file.content = content
    if is_flushed:
        file.kept = content
