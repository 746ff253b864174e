"""The objects below one prefix of a bucket, as the files of a folder. Knows nothing about runs.

A PUT is whole or not there, and nothing can be renamed; what takes a rename's place is the
conditional PUT, which succeeds only while an object is the one that was seen last. Amazon's and
Azure's stores know an object by its ETag then, Google's by its generation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from pipeline.errors import RunDirectoryError, StorageError, UsageError
from pipeline.location import Location
from pipeline.storage.durable import write_errors, write_whole
from pipeline.storage.object_store import ObjectUrl
from pipeline.storage.store_client import ATTEMPTS, UPLOAD_S, connect
from pipeline.storage.store_faults import explain_fault, is_missing

_AT_A_TIME = 4 << 20
# An upload in several parts becomes an object when all are there. They share the line, and each
# has its time.
_IN_PARTS: Final[Mapping[str, Any]] = {"chunk_size": 8 << 20, "max_concurrency": 2}
_PROBE = ".conditional-writes"
_NOT_MET: Final = ("PreconditionError", "AlreadyExistsError", "FileNotFoundError")
_NOBODY: Final = {
    "s3": '"00000000000000000000000000000000"',
    "az": '"0x8D00000000000000"',
    "gs": "1",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A small object as it was read. `etag` names this content and no other."""

    content: bytes
    etag: str


class SupersededError(Exception):
    """A conditional PUT came too late; `now` is what is there, None if nothing."""

    def __init__(self, now: Stored | None) -> None:
        super().__init__("another writer was faster")
        self.now = now


class RemoteFolder:
    """Files by relative names like `data/x.parquet`. Every method raises StorageError."""

    def __init__(self, location: Location) -> None:
        """Raises UsageError if the URL or an option cannot be; asks nobody."""
        try:
            url = ObjectUrl.parse(str(location))
            self._store = connect(location, url)
            self._patient = connect(location, url, UPLOAD_S)
        except ValueError as error:
            raise UsageError(f"cannot use this as the output: {error}") from None
        key = url.key.strip("/")
        self.url = f"{url.root}/{key}".rstrip("/")
        self.endpoint = location.endpoint
        self._scheme = url.scheme
        self._prefix = f"{key}/" if key else ""

    def names(self, below: str = "") -> dict[str, int]:
        """Every file below this folder of it, with its size in bytes."""
        prefix = f"{self._prefix}{below}"
        found = self._ask(f"list {self.url}", "list", prefix, read=_sizes)
        # A console marks a folder by an empty object of its name.
        folders = {str(folder) for name in found for folder in PurePosixPath(name).parents}
        folders.add(prefix.rstrip("/"))
        return {
            name.removeprefix(self._prefix): size
            for name, size in found.items()
            if size or name not in folders
        }

    @property
    def name(self) -> str:
        """The last piece of the URL's path; empty for a whole bucket."""
        return self._prefix.rstrip("/").rpartition("/")[2]

    def beside(self, name: str) -> RemoteFolder:
        """The folder of this name that lies where this one lies."""
        other = copy.copy(self)
        other.url = f"{self.url.rpartition('/')[0]}/{name}"
        other._prefix = f"{self._parent}{name}/"
        return other

    def names_beside(self) -> list[str]:
        """The names of all folders that lie where this one lies, its own among them."""
        found = self._list_level(self._parent)["common_prefixes"]
        return [str(path).rstrip("/").removeprefix(self._parent) for path in found]

    def names_inside(self) -> list[str]:
        """The names of the files that lie in the folder itself, not in folders of it."""
        paths = [entry["path"] for entry in self._list_level(self._prefix)["objects"]]
        own = self._prefix.rstrip("/")
        return [path.removeprefix(self._prefix) for path in paths if path != own]

    @property
    def _parent(self) -> str:
        parent = self._prefix.rstrip("/").rpartition("/")[0]
        return f"{parent}/" if parent else ""

    def _list_level(self, prefix: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._ask(
            f"list {self.url}", "list_with_delimiter", prefix or None
        )
        return found

    def read(self, name: str) -> Stored | None:
        """A small file in memory; None if it is not there."""
        try:
            held: Stored = self._ask(
                f"read {self.url}/{name}", "get", self._at(name), read=self._stored
            )
            return held
        except FileNotFoundError:
            return None

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to this machine, old or new but never half."""

        def download(file: BinaryIO) -> int:
            def write(answer: Any) -> int:
                return sum(file.write(bytes(piece)) for piece in answer.stream(_AT_A_TIME))

            size: int = self._ask(f"read {self.url}/{name}", "get", self._at(name), read=write)
            return size

        write_whole(path, download)

    def put(self, name: str, path: Path) -> None:
        """Copy a file of this machine to the store; TLS, or its signature, guards the bytes."""
        with write_errors(path), path.open("rb") as file:
            what = f"write {self.url}/{name}"
            self._ask(what, "put", self._at(name), file, is_upload=True, **_IN_PARTS)

    def put_if(self, name: str, content: bytes, etag: str | None) -> str:
        """Replace the file that has this ETag (None: there is no file); returns the new one's.

        Raises SupersededError if another one is there. An answer that was lost on its way makes
        the second try meet the first, so what is there is compared before anybody is blamed.
        """
        for _ in range(ATTEMPTS):
            try:
                return self._put_if(name, content, etag)
            except _NotMet:
                now = self.read(name)
            if now is not None and now.content == content:
                return now.etag
            if (None if now is None else now.etag) != etag:
                raise SupersededError(now)
        raise StorageError(f"cannot write {self.url}/{name}: the store is busy with it; try again")

    def delete(self, names: Iterable[str]) -> None:
        """Remove these files; one that is not there is no fault."""
        for name in names:
            try:
                self._ask(f"remove {self.url}/{name}", "delete", self._at(name))
            except FileNotFoundError:
                continue

    def check_conditions(self) -> None:
        """Raises RunDirectoryError if the store ignores conditions: it would lose writes silently.

        Asks it to replace what is not there, which leaves nothing behind where it is refused.
        """
        try:
            self._put_if(_PROBE, b"", _NOBODY[self._scheme])
        except _NotMet:
            return
        self.delete([_PROBE])
        raise RunDirectoryError(
            f"the store of {self.url} ignores conditional writes, so two writers could not be told "
            "apart; write to a folder and copy it"
        )

    def _put_if(self, name: str, content: bytes, etag: str | None) -> str:
        """Raises _NotMet."""
        mode = "create" if etag is None else {self._tag: etag}
        what = f"write {self.url}/{name}"
        try:
            return str(self._ask(what, "put", self._at(name), content, mode=mode)[self._tag])
        except FileNotFoundError:
            raise _NotMet from None

    @property
    def _tag(self) -> str:
        """By what the store knows an object in a condition."""
        return "version" if self._scheme == "gs" else "e_tag"

    def _stored(self, answer: Any) -> Stored:
        return Stored(bytes(answer.bytes()), str(answer.meta[self._tag]))

    def _at(self, name: str) -> str:
        return self._prefix + name

    def _ask(
        self, what: str, operation: str, *arguments: Any, read: Callable[[Any], Any] = lambda a: a,
        is_upload: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """What `read` makes of the store's answer. Raises FileNotFoundError for an object that is
        not there, _NotMet, StorageError."""
        with _store_errors(f"cannot {what}", self._scheme):
            store = self._patient if is_upload else self._store
            return read(getattr(store, operation)(*arguments, **options))


class _NotMet(Exception):
    """The condition of a PUT does not hold."""


def _sizes(pages: Iterable[Iterable[Mapping[str, Any]]]) -> dict[str, int]:
    return {str(entry["path"]): int(entry["size"]) for page in pages for entry in page}


@contextmanager
def _store_errors(what: str, scheme: str) -> Iterator[None]:
    """Turn what obstore raises into a StorageError: what, why and the remedy."""
    try:
        yield
    except Exception as error:
        if is_missing(error):
            raise
        if type(error).__name__ in _NOT_MET and not isinstance(error, FileNotFoundError):
            raise _NotMet from None
        reason = explain_fault(error, scheme)
        raise StorageError(f"{what}: {reason}; then run the same command again") from error
