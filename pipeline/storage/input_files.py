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

from pipeline.errors import InputError, NoInput
from pipeline.settings import StoreSettings
from pipeline.storage.object_store import SCHEME, explain_read_fault, find_objects, is_url

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
        return self._stream("detect")

    def stamp(self) -> tuple[int, int | str]:
        """Size and time of the last change: another file, another stamp. Raises OSError."""
        if not self.is_local:
            return self._object_stamp()
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError("it is not there")
        return info.size, info.mtime_ns or 0

    def _object_stamp(self) -> tuple[int, str]:
        # A store's clock counts whole seconds; the ETag is another one for other content.
        with self.filesystem.open_input_stream(self.path) as stream:
            seen = stream.metadata()
        return int(seen["Content-Length"]), (seen.get("ETag") or seen["Last-Modified"]).decode()

    def content_hash(self) -> bytes:
        """sha256 of the bytes, streamed. Raises InputError."""
        digest = hashlib.sha256()
        with damage_named(self.name), self._stream(None) as stream:
            while chunk := stream.read(_HASHED_AT_A_TIME):
                digest.update(chunk)
        return digest.digest()

    def _stream(self, compression: str | None) -> pa.NativeFile:
        return self.filesystem.open_input_stream(self.path, compression)


def find_input_files(
    argument: str | Path, store: StoreSettings | None = None
) -> tuple[InputFile, ...]:
    """The file itself, all files of rows below a folder, or what a glob matches, sorted by name.

    Hidden files and those that begin with an underscore are somebody's temporary files: left out.
    `store` is how an `s3://` URL is reached. Raises NoInput if there is nothing, InputError.
    """
    if is_url(argument):
        filesystem, paths = find_objects(str(argument), store or StoreSettings(), ENDINGS)
        return tuple(InputFile(filesystem, path, f"{SCHEME}://{path}") for path in paths)
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
        raise NoInput(lacking)
    return tuple(map(InputFile.local, sorted(found, key=lambda p: p.as_posix())))


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
