"""Objects below `s3://` as input: which ones a URL means. Knows nothing about formats."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InputError, NoInput
from pipeline.inputs.selection import Selection, select, select_matches
from pipeline.location import Location
from pipeline.storage.object_store import (
    ANSWER_S,
    ATTEMPTS,
    CONNECT_S,
    ObjectUrl,
    explain_read_fault,
)

_WILD = re.compile(r"[*?[]")


def find_objects(location: Location) -> tuple[fs.FileSystem, Selection]:
    """The object itself, those of rows below a prefix, or what a glob matches, see `selection`.

    Returns the file system and paths on it. Raises NoInput if there is nothing, InputError.
    """
    try:
        url = ObjectUrl.parse(str(location))
        filesystem = open_filesystem(location)
        found = _find(filesystem, url)
    except ValueError as error:  # pa.ArrowInvalid is one
        raise InputError(f"cannot read from the store: {error}") from None
    except (pa.ArrowException, OSError) as error:
        reason = explain_read_fault(error) or f"{str(error).splitlines()[0][:200]}; try again"
        raise InputError(f"cannot read {location}: {reason}") from error
    if not found.names:
        is_folder = not url.key or url.key.endswith("/")
        what = "*.parquet or *.jsonl object below" if is_folder else "object, prefix or match for"
        raise NoInput(f"there is no {what} {location}; check the URL")
    return filesystem, found


def open_filesystem(location: Location) -> fs.FileSystem:
    """pyarrow's view of the store. Raises OSError."""
    options, endpoint = location.store.storage_options, location.endpoint
    arguments = {
        "access_key": options.get("access_key_id"),
        "secret_key": options.get("secret_access_key"),
        "session_token": options.get("session_token"),
        "region": options.get("region"),
        "anonymous": options.get("anonymous") == "true" or None,
    }
    if endpoint is not None:
        scheme, _, host = endpoint.rstrip("/").partition("://")
        arguments |= {"scheme": scheme, "endpoint_override": host}
    return fs.S3FileSystem(
        **{name: value for name, value in arguments.items() if value is not None},
        connect_timeout=CONNECT_S,
        request_timeout=ANSWER_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _find(filesystem: fs.FileSystem, url: ObjectUrl) -> Selection:
    if url.key and not url.key.endswith("/"):
        if filesystem.get_file_info(url.path).type == fs.FileType.File:
            return Selection((url.path,))
        if _WILD.search(url.key):
            return _match(filesystem, url)
    top = url.path
    found = select([path[len(top) + 1 :] for path in _list(filesystem, top)])
    return replace(found, names=tuple(f"{top}/{name}" for name in found.names))


def _match(filesystem: fs.FileSystem, url: ObjectUrl) -> Selection:
    wanted = url.path.split("/")
    fixed = next(i for i, part in enumerate(wanted) if _WILD.search(part))
    below = _list(filesystem, "/".join(wanted[:fixed]))
    matches = [path for path in below if _fits(path.split("/")[fixed:], wanted[fixed:])]
    return select_matches(url.path, matches, below)


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


def _list(filesystem: fs.FileSystem, path: str) -> list[str]:
    try:
        # `allow_not_found` would take a bucket that is not there for an empty one.
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except FileNotFoundError:
        return []
    return [info.path for info in infos if info.type == fs.FileType.File]
