"""An object of a store as a file that is read: in any order, or once from the start."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from pipeline.storage.object_store import BUCKETS
from pipeline.storage.store_faults import store_faults

_AT_A_TIME = 4 << 20


class ObjectReader(io.RawIOBase):
    """Each read is one request. One that meets another object than the first raises StoreFault."""

    def __init__(self, store: Any, path: str, scheme: str) -> None:
        super().__init__()
        self._store, self._path, self._scheme = store, path, scheme
        meta = describe(store, path, scheme)
        self._size, self._etag = int(meta["size"]), _strong(meta.get("e_tag"))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        options: dict[str, Any] = {"range": (self._at, end)}
        if self._etag is not None:
            options["if_match"] = self._etag
        with store_faults(self._scheme):
            content = bytes(self._store.get(self._path, options=options).bytes())
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class StreamReader(io.RawIOBase):
    """The chunks of one answer, as they come."""

    def __init__(self, store: Any, path: str, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme
        with store_faults(scheme):
            self._chunks: Iterator[Any] = iter(store.get(path).stream(min_chunk_size=_AT_A_TIME))
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            with store_faults(self._scheme):
                chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(bytes(chunk))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def describe(store: Any, path: str, scheme: str) -> dict[str, Any]:
    """Size, ETag and time of an object. Of a web server by GET: not all of them know HEAD."""
    with store_faults(scheme):
        meta: dict[str, Any] = store.head(path) if scheme in BUCKETS else store.get(path).meta
        return meta


def _strong(etag: str | None) -> str | None:
    """An ETag that a condition may name: weak ones never match."""
    return None if etag is None or etag.startswith("W/") else etag
