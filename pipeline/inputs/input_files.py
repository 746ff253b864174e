"""Which files an input means, and how their bytes are read. Knows nothing about their format."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa

from pipeline.errors import InputError, NoInput
from pipeline.inputs.hub_files import find_on_hub
from pipeline.inputs.input_objects import find_objects, find_on_web
from pipeline.inputs.selection import MATCHED_AGAIN, Selection, each_once, search, select_matches
from pipeline.location import Location
from pipeline.storage.object_store import BUCKETS, WEB
from pipeline.storage.store_faults import StoreFault

_HASHED_AT_A_TIME = 4 << 20

Stamp = tuple[int | str, ...]
Stamps = dict[str, Stamp]


class Home(Protocol):
    """Where files are read from. `root`: what the names of all of them begin with."""

    @property
    def root(self) -> str: ...

    def open(self, path: str) -> BinaryIO:
        """For random reads. Raises OSError."""

    def open_stream(self, path: str) -> BinaryIO:
        """For one read from the start. Raises OSError."""

    def stamp(self, path: str) -> Stamp:
        """Another file, another stamp; one that differs in the first two is another file. Raises
        OSError."""


class LocalHome:
    """The file system of this machine."""

    root = ""

    def open(self, path: str) -> BinaryIO:
        opened: BinaryIO = pa.OSFile(path)
        return opened

    def open_stream(self, path: str) -> BinaryIO:
        return self.open(path)

    def stamp(self, path: str) -> Stamp:
        """Size and times, of which nobody can set the one of the last change."""
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError("it is not there")
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True, eq=False)
class InputFile:
    """A file somewhere; `name` is how a person would write it."""

    home: Home
    path: str
    name: str

    @classmethod
    def local(cls, path: Path) -> InputFile:
        """A file on this machine."""
        return cls(LocalHome(), str(path.absolute()), str(path))

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine."""
        return isinstance(self.home, LocalHome)

    @property
    def base_name(self) -> str:
        """The last part of its name."""
        return self.path.rsplit("/", 1)[-1]

    def open(self) -> pa.NativeFile:
        """For random reads. Raises OSError."""
        return _native(self.home.open(self.path))

    def open_stream(self) -> pa.NativeFile:
        """For one read from the start, decompressed where the name ends in .gz. Raises OSError."""
        stream = _native(self.home.open_stream(self.path))
        return pa.CompressedInputStream(stream, "gzip") if self.path.endswith(".gz") else stream

    def stamp(self) -> Stamp:
        """Another file, another stamp. Raises OSError."""
        return self.home.stamp(self.path)

    def content_hash(self) -> bytes:
        """sha256 of the bytes, streamed. Raises InputError."""
        digest = hashlib.sha256()
        with damage_named(self.name):
            with _native(self.home.open_stream(self.path)) as stream:
                while chunk := stream.read(_HASHED_AT_A_TIME):
                    digest.update(chunk)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class FoundFiles:
    """The files of an input, sorted by name; `summary` says of several which ones, and is empty of
    one that was named."""

    files: tuple[InputFile, ...]
    summary: str = ""


def find_input_files(location: Location) -> FoundFiles:
    """The file itself, all files of rows below a folder, or what a glob matches, see `selection`.

    Raises NoInput if there is nothing, InputError.
    """
    if location.is_remote:
        return _find_remote(location)
    path = location.local
    with damage_named(path):
        if path.is_file():
            return FoundFiles((InputFile.local(path),))
        if path.is_dir():
            found = search(path)
            files = [InputFile.local(path / name) for name in found.names]
            lacking = f"the folder {path} holds no *.parquet, *.jsonl or *.csv file"
        else:
            found = _match(str(location))
            files = [InputFile.local(Path(name)) for name in found.names]
            lacking = f"there is no file, folder or match for {path}"
    if not files:
        raise NoInput(f"{lacking}{' to read' * bool(found.left_out)}; check the path")
    return _summed_up(location, files, found)


def _native(file: BinaryIO) -> pa.NativeFile:
    return file if isinstance(file, pa.NativeFile) else pa.PythonFile(file, mode="r")


def _find_remote(location: Location) -> FoundFiles:
    find = _FINDERS.get(location.scheme)
    if find is None:
        known = ", ".join(f"{scheme}://" for scheme in _FINDERS if scheme != "http")
        raise InputError(f"{location.scheme}:// is not supported; use a folder or one of {known}")
    home, found = find(location)
    files = [InputFile(home, path, f"{home.root}/{path}") for path in found.names]
    return _summed_up(location, files, found)


_Find = Callable[[Location], tuple[Home, Selection]]
_FINDERS: dict[str, _Find] = {
    **dict.fromkeys(BUCKETS, find_objects),
    "hf": find_on_hub,
    **dict.fromkeys(WEB, find_on_web),
}


def stamp_input(location: Location) -> Stamps:
    """Of the files that an input means now, by name. Raises NoInput, InputError."""
    stamps: Stamps = {}
    for file in find_input_files(location).files:
        with damage_named(file.name):
            stamps[file.name] = file.stamp()
    return stamps


def _match(pattern: str) -> Selection:
    matches = [m for m in glob.glob(pattern, recursive=True) if Path(m).is_file()]
    once = each_once(matches)
    # The files by which a run or a plan is known, where `**` may have matched theirs.
    top, deep, _ = pattern.partition("**")
    below = glob.glob(f"{top}**", recursive=True) if deep else []
    found = select_matches(pattern, once, below)
    again = Counter({MATCHED_AGAIN: len(matches) - len(once)})
    return replace(found, left_out=found.left_out + again)


def _summed_up(location: Location, files: list[InputFile], found: Selection) -> FoundFiles:
    files.sort(key=lambda file: file.name)
    is_plain = len(files) == 1 and not found.left_out
    return FoundFiles(tuple(files), "" if is_plain else f"{location}: {found.describe()}")


@contextmanager
def damage_named(name: str | Path) -> Iterator[None]:
    """Turn every way in which Arrow fails on damaged bytes into an InputError with `name`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, StoreFault):
            raise InputError(f"cannot read {name}: {error}") from error
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{name} is damaged or not readable ({reason}); write or copy it again"
        ) from error
