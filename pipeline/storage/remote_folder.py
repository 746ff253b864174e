"""The objects below one `s3://` prefix, as the files of a folder. Knows nothing about runs.

A PUT is whole or not there, and nothing can be renamed; what takes a rename's place is the
conditional PUT, which succeeds only while an object is the one that was seen last. Reading alone is
`object_store`'s, by pyarrow, which cannot do that.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import RunDirectoryError, StorageError, UsageError, install_extra
from pipeline.location import Location
from pipeline.storage.durable import write_errors, write_whole
from pipeline.storage.object_store import (
    ANSWER_S,
    ATTEMPTS,
    CONNECT_S,
    SCHEME,
    ObjectUrl,
    explain_fault,
)

_AT_A_TIME = 4 << 20
_PROBE = ".conditional-writes"
_NOT_MET = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")


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
        """Raises UsageError if the URL, an option or the library is not there; asks nobody."""
        try:
            url = ObjectUrl.parse(str(location))
        except ValueError as error:
            raise UsageError(f"cannot use this as the output: {error}") from None
        key = url.key.strip("/")
        self.url = f"{SCHEME}://{url.bucket}/{key}".rstrip("/")
        self.endpoint = location.endpoint
        self._bucket = url.bucket
        self._prefix = f"{key}/" if key else ""
        self._client = _connect(location, self.url)

    def names(self, below: str = "") -> dict[str, int]:
        """Every file whose name begins so, with its size in bytes."""
        found: dict[str, int] = {}
        with _store_errors(f"cannot list {self.url}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + below):
                for entry in page.get("Contents", []):
                    found[entry["Key"].removeprefix(self._prefix)] = entry["Size"]
        # A console marks a folder by an empty object of its name.
        return {name: size for name, size in found.items() if name and not name.endswith("/")}

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
        return [name[:-1] for name in self._list_level(self._parent) if name.endswith("/")]

    def names_inside(self) -> list[str]:
        """The names of the files that lie in the folder itself, not in folders of it."""
        return [name for name in self._list_level(self._prefix) if not name.endswith("/")]

    @property
    def _parent(self) -> str:
        parent = self._prefix.rstrip("/").rpartition("/")[0]
        return f"{parent}/" if parent else ""

    def _list_level(self, prefix: str) -> Iterator[str]:
        """Names of files, and of folders with a slash at the end, directly below `prefix`."""
        with _store_errors(f"cannot list {self.url}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                found = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
                found += [entry["Key"] for entry in page.get("Contents", [])]
                yield from (key.removeprefix(prefix) for key in found if key != prefix)

    def read(self, name: str) -> Stored | None:
        """A small file in memory; None if it is not there."""
        with _store_errors(f"cannot read {self.url}/{name}"):
            try:
                answer = self._client.get_object(**self._at(name))
            except self._client.exceptions.NoSuchKey:
                return None
            return Stored(answer["Body"].read(), answer["ETag"])

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to this machine, old or new but never half."""

        def download(file: BinaryIO) -> int:
            with _store_errors(f"cannot read {self.url}/{name}"):
                body = self._client.get_object(**self._at(name))["Body"]
                return sum(map(file.write, body.iter_chunks(_AT_A_TIME)))

        write_whole(path, download)

    def put(self, name: str, path: Path) -> None:
        """Copy a file of this machine to the store, which checks its hash."""
        with write_errors(path), path.open("rb") as file:
            digest = _md5(file)
            with _store_errors(f"cannot write {self.url}/{name}"):
                self._client.put_object(**self._at(name), Body=file, ContentMD5=digest)

    def put_if(self, name: str, content: bytes, etag: str | None) -> str:
        """Replace the file that has this ETag (None: there is no file); returns the new one's.

        Raises SupersededError if another one is there. An answer that was lost on its way makes
        the second try meet the first, so what is there is compared before anybody is blamed.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        for _ in range(ATTEMPTS):
            with _store_errors(f"cannot write {self.url}/{name}"):
                try:
                    answer = self._client.put_object(**self._at(name), Body=content, **condition)
                    return str(answer["ETag"])
                except self._client.exceptions.ClientError as error:
                    if error.response["Error"]["Code"] not in _NOT_MET:
                        raise
            now = self.read(name)
            if now is not None and now.content == content:
                return now.etag
            if (None if now is None else now.etag) != etag:
                raise SupersededError(now)
        raise StorageError(f"cannot write {self.url}/{name}: the store is busy with it; try again")

    def delete(self, names: Iterable[str]) -> None:
        """Remove these files; one that is not there is no fault."""
        for name in names:
            with _store_errors(f"cannot remove {self.url}/{name}"):
                self._client.delete_object(**self._at(name))

    def check_conditions(self) -> None:
        """Raises RunDirectoryError if the store ignores conditions: it would lose writes silently.

        Asks it to replace what is not there, which leaves nothing behind where it is refused.
        """
        nobody = '"00000000000000000000000000000000"'
        with _store_errors(f"cannot write {self.url}/{_PROBE}"):
            try:
                self._client.put_object(**self._at(_PROBE), Body=b"", IfMatch=nobody)
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in _NOT_MET:
                    raise
                return
        self.delete([_PROBE])
        raise RunDirectoryError(
            f"the store of {self.url} ignores conditional writes, so two writers could not be told "
            "apart; write to a folder and copy it"
        )

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}


def _connect(location: Location, url: str) -> Any:
    try:
        import botocore.session  # of boto3, which adds nothing that is needed here
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise UsageError(f"{url} needs boto3; {install_extra('s3')}") from None
    options, endpoint = location.store.storage_options, location.endpoint
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": "path" if endpoint else "auto"},
        signature_version=UNSIGNED if options.get("anonymous") == "true" else None,
        # Stores other than AWS's may not know its newer checksums; all know Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        with _store_errors(f"cannot use {url}"):
            session = botocore.session.Session()
            loader = _service_descriptions(session.get_config_variable("data_path"))
            session.register_component("data_loader", loader)
            return session.create_client(
                "s3",
                endpoint_url=endpoint,
                region_name=options.get("region"),
                aws_access_key_id=options.get("access_key_id"),
                aws_secret_access_key=options.get("secret_access_key"),
                aws_session_token=options.get("session_token"),
                config=config,
            )
    except ValueError as error:
        raise UsageError(f"cannot use {url}: {error}; check AWS_ENDPOINT_URL") from None


@functools.cache
def _service_descriptions(data_path: str | None) -> Any:
    """What botocore reads of each service before there is a client, for all sessions once.

    That is most of the time that a client takes, and a job makes half a dozen of them.
    """
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _md5(file: BufferedReader) -> str:
    digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
    file.seek(0)
    return base64.b64encode(digest).decode()


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    """Turn what boto3 raises into a StorageError: what, why and the remedy."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        reason = explain_fault(error) or str(error).splitlines()[0][:200]
        raise StorageError(f"{what}: {reason}; then run the same command again") from error
