"""Which files an input means, and how their bytes are read. Knows nothing about their format."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InputError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
"""Of the files that a folder is searched for."""
_HASHED_AT_A_TIME = 4 << 20


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
    def base_name(self) -> str:
        """The last part of its name."""
        return self.path.rsplit("/", 1)[-1]

    def open(self) -> pa.NativeFile:
        """For random reads. Raises OSError."""
        return self.filesystem.open_input_file(self.path)

    def open_stream(self) -> pa.NativeFile:
        """For one read from the start, decompressed where the name ends in .gz. Raises OSError."""
        return self._stream("detect")

    def stamp(self) -> tuple[int, int]:
        """Size and time of the last change: another file, another stamp. Raises OSError."""
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError("it is not there")
        return info.size, info.mtime_ns or 0

    def content_hash(self) -> bytes:
        """sha256 of the bytes, streamed. Raises InputError."""
        digest = hashlib.sha256()
        with damage_named(self.name), self._stream(None) as stream:
            while chunk := stream.read(_HASHED_AT_A_TIME):
                digest.update(chunk)
        return digest.digest()

    def _stream(self, compression: str | None) -> pa.NativeFile:
        return self.filesystem.open_input_stream(self.path, compression)


def find_input_files(argument: str | Path) -> tuple[InputFile, ...]:
    """The file itself, all files of rows below a folder, or what a glob matches, sorted by name.

    Hidden files and those that begin with an underscore are somebody's temporary files: left out.
    Raises InputError if there is nothing.
    """
    place = Path(argument)
    with damage_named(place):
        if place.is_file():
            return (InputFile.local(place),)
        if place.is_dir():
            named = (p for p in place.rglob("*") if p.name.endswith(ENDINGS))
            found = [p for p in named if p.is_file() and p.name[0] not in "._"]
            lacking = f"the folder {place} holds no *.parquet or *.jsonl file; check the path"
        else:
            found = [p for p in map(Path, glob.glob(str(argument), recursive=True)) if p.is_file()]
            lacking = f"there is no file, folder or match for {place}; check the path"
    if not found:
        raise InputError(lacking)
    return tuple(map(InputFile.local, sorted(found, key=lambda p: p.as_posix())))


@contextmanager
def damage_named(name: str | Path) -> Iterator[None]:
    """Turn every way in which Arrow fails on damaged bytes into an InputError with `name`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{name} is damaged or not readable ({reason}); write or copy it again"
        ) from error
