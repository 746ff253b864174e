"""Which files an input means, and how their bytes are read. Knows nothing about their format."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InputError, NoInput
from pipeline.inputs.input_objects import find_objects
from pipeline.inputs.selection import MATCHED_AGAIN, Selection, each_once, search, select_matches
from pipeline.location import Location
from pipeline.storage.object_store import SCHEME, explain_read_fault

_HASHED_AT_A_TIME = 4 << 20

Stamp = tuple[int | str, ...]
Stamps = dict[str, Stamp]


@dataclass(frozen=True, eq=False)
class InputFile:
    """A file on some file system; `name` is how a person would write it."""

    filesystem: fs.FileSystem
    path: str
    name: str

    @classmethod
    def local(cls, path: Path) -> InputFile:
        """A file on this machine."""
        return cls(fs.LocalFileSystem(), str(path.absolute()), str(path))

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def base_name(self) -> str:
        """The last part of its name."""
        return self.path.rsplit("/", 1)[-1]

    def open(self) -> pa.NativeFile:
        """For random reads. Raises OSError."""
        return self.filesystem.open_input_file(self.path)

    def open_stream(self) -> pa.NativeFile:
        """For one read from the start, decompressed where the name ends in .gz. Raises OSError."""
        return self.filesystem.open_input_stream(self.path, "detect")

    def stamp(self) -> Stamp:
        """Another file, another stamp: size and times, of which nobody can set the one of the last
        change. Raises OSError."""
        if not self.is_local:
            # A store's clock counts whole seconds; the ETag is another one for other content.
            with self.filesystem.open_input_stream(self.path) as stream:
                seen = stream.metadata()
            return int(seen["Content-Length"]), (seen.get("ETag") or seen["Last-Modified"]).decode()
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError("it is not there")
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def content_hash(self) -> bytes:
        """sha256 of the bytes, streamed. Raises InputError."""
        digest = hashlib.sha256()
        with damage_named(self.name):
            with self.filesystem.open_input_stream(self.path, None) as stream:
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
        filesystem, found = find_objects(location)
        files = [InputFile(filesystem, path, f"{SCHEME}://{path}") for path in found.names]
        return _summed_up(location, files, found)
    path = location.local
    with damage_named(path):
        if path.is_file():
            return FoundFiles((InputFile.local(path),))
        if path.is_dir():
            found = search(path)
            files = [InputFile.local(path / name) for name in found.names]
            lacking = f"the folder {path} holds no *.parquet or *.jsonl file"
        else:
            found = _match(str(location))
            files = [InputFile.local(Path(name)) for name in found.names]
            lacking = f"there is no file, folder or match for {path}"
    if not files:
        raise NoInput(f"{lacking}{' to read' * bool(found.left_out)}; check the path")
    return _summed_up(location, files, found)


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
        fault = explain_read_fault(error)
        if fault is not None:
            raise InputError(f"cannot read {name}: {fault}") from error
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{name} is damaged or not readable ({reason}); write or copy it again"
        ) from error
