"""Objects of a bucket, or a file of a web server, as input: which ones a URL means. Knows nothing
about formats."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, BinaryIO
from urllib.parse import unquote

from pipeline.errors import InputError, NoInput
from pipeline.inputs.selection import Selection, select, select_matches
from pipeline.location import Location
from pipeline.storage.object_reader import ObjectReader, StreamReader, describe
from pipeline.storage.object_store import ObjectUrl
from pipeline.storage.store_client import connect, connect_to_web
from pipeline.storage.store_faults import StoreFault, store_faults

WILD = re.compile(r"[*?[]")
_WEB_URL = re.compile(r"(https?://[^/@\s]+)/([^?#\s]*[^/?#\s])")


@dataclass(frozen=True, eq=False)
class ObjectHome:
    """A bucket or a web server. `root`: the URL of all that is in it; see `input_files.Home`."""

    root: str
    store: Any = field(repr=False)

    @property
    def scheme(self) -> str:
        return self.root.partition("://")[0]

    def open(self, path: str) -> BinaryIO:
        """For random reads. Raises OSError."""
        return ObjectReader(self.store, path, self.scheme)  # type: ignore[return-value]

    def open_stream(self, path: str) -> BinaryIO:
        """For one read from the start. Raises OSError."""
        return StreamReader(self.store, path, self.scheme)  # type: ignore[return-value]

    def stamp(self, path: str) -> tuple[int | str, ...]:
        """Size and ETag, which is another one for other content. Raises OSError."""
        seen = describe(self.store, path, self.scheme)
        return int(seen["size"]), seen.get("e_tag") or str(seen["last_modified"])


def find_objects(location: Location) -> tuple[ObjectHome, Selection]:
    """The object itself, those of rows below a prefix, or what a glob matches, see `selection`.

    The names are keys. Raises NoInput if there is nothing, InputError.
    """
    with _faults_named(location):
        url = ObjectUrl.parse(str(location))
        home = ObjectHome(url.root, connect(location, url))
        found = _find(home, url)
    if not found.names:
        is_folder = not url.key or url.key.endswith("/")
        what = "file of rows below" if is_folder else "object, prefix or match for"
        raise NoInput(f"there is no {what} {location}; check the URL")
    return home, found


def find_on_web(location: Location) -> tuple[ObjectHome, Selection]:
    """The one file that an `https://` URL names. Raises NoInput, InputError."""
    match = _WEB_URL.fullmatch(str(location))
    if match is None:
        raise InputError(
            "a URL of the web must look like https://host/path/file.parquet, without a password or "
            "a query, which run.json would keep; download what has one"
        )
    root, path = match[1], unquote(match[2])
    if "*" in path:
        raise InputError(f"a web server lists no files, so {location} cannot be a glob; name one")
    try:
        with _faults_named(location):
            home = ObjectHome(root, connect_to_web(root))
            home.stamp(path)
    except FileNotFoundError:
        raise NoInput(f"there is no file at {location}; check the URL") from None
    return home, Selection((path,))


@contextmanager
def _faults_named(location: Location) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"cannot read from the store: {error}") from None
    except StoreFault as error:
        raise InputError(f"cannot read {location}: {error}") from error


def _find(home: ObjectHome, url: ObjectUrl) -> Selection:
    if url.key and not url.key.endswith("/"):
        if _is_object(home, url.key):
            return Selection((url.key,))
        if WILD.search(url.key):
            return match(url.key, lambda top: _list(home, top))
    top = url.key.strip("/")
    return below(top, _list(home, top))


def _is_object(home: ObjectHome, key: str) -> bool:
    try:
        return bool(home.stamp(key))
    except FileNotFoundError:
        return False


def below(top: str, paths: list[str]) -> Selection:
    """Those of rows among all paths below a folder."""
    prefix = f"{top}/" if top else ""
    found = select([path.removeprefix(prefix) for path in paths])
    return replace(found, names=tuple(f"{prefix}{name}" for name in found.names))


def match(pattern: str, list_below: Any) -> Selection:
    """Those that a glob matches. `list_below`: all paths below a folder."""
    wanted = pattern.split("/")
    fixed = next(i for i, part in enumerate(wanted) if WILD.search(part))
    paths = list_below("/".join(wanted[:fixed]))
    matches = [path for path in paths if _fits(path.split("/")[fixed:], wanted[fixed:])]
    return select_matches(pattern, matches, paths)


def _fits(names: list[str], patterns: list[str]) -> bool:
    """As `glob` decides it: `**` is any number of folders, and no wildcard begins with a dot."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        skips = bool(names) and names[0][0] != "." and _fits(names[1:], patterns)
        return skips or _fits(names, patterns[1:])
    if not names or (names[0][0] == "." and patterns[0][0] != "."):
        return False
    return fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _list(home: ObjectHome, top: str) -> list[str]:
    """Keys of the objects below a folder, without the empty ones by which consoles mark folders."""
    with store_faults(home.scheme):
        entries = [entry for page in home.store.list(top or None) for entry in page]
    return [entry["path"] for entry in entries if entry["size"] or "." in entry["path"]]
