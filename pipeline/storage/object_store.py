"""Objects below `s3://` as input: which ones a URL means, and what to do when the store refuses.

Reads through pyarrow and knows nothing about formats. Every call ends within about 30 seconds: a
store that does not answer is an error, not a job that hangs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InputError, NoInput
from pipeline.settings import StoreSettings
from pipeline.storage.selection import Selection, select, select_matches

SCHEME = "s3"
CONNECT_S = 4
ANSWER_S = 8
ATTEMPTS = 3
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_WILD = re.compile(r"[*?[]")

# What is in a message of AWS's C++ or Python library -> what it means for a person.
_FAULTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NO_SUCH_BUCKET", "NoSuchBucket"),
        "there is no such bucket; check its name and --storage-options endpoint_url",
    ),
    (
        ("PermanentRedirect", "HTTP status 301", "(301)", "AuthorizationHeaderMalformed"),
        "the bucket is in another region; name it by --storage-options region=...",
    ),
    (
        (
            "ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId",
            "SIGNATURE_DOES_NOT_MATCH", "SignatureDoesNotMatch", "ExpiredToken", "EXPIRED_TOKEN",
            "InvalidToken", "INVALID_CLIENT_TOKEN_ID", "HTTP status 403", "(403)",
            "Unable to locate credentials", "config profile", "Forbidden",
        ),
        "the store refuses the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or "
        "AWS_PROFILE, and what they may do",
    ),
    (
        (
            "NETWORK_CONNECTION", "Could not connect", "Connect timeout", "Read timeout",
            "Connection was closed", "IncompleteRead", "Connection broken",
        ),
        "the store cannot be reached; check the network and --storage-options endpoint_url",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """`s3://bucket/key`; the key may be empty, end in a slash or hold wildcards."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, text: str) -> ObjectUrl:
        """Raises ValueError with a sentence that does not quote what may be a password."""
        scheme, _, rest = text.partition("://")
        if scheme != SCHEME:
            raise ValueError(f"{scheme}:// is not supported; use a folder or s3://")
        bucket, _, key = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
            raise ValueError(
                "a URL must look like s3://bucket/name; credentials belong to the environment or "
                "to --storage-options"
            )
        return cls(bucket, key)

    @property
    def path(self) -> str:
        """As pyarrow wants it."""
        return f"{self.bucket}/{self.key}".rstrip("/")


def is_url(argument: object) -> bool:
    """Whether this names something outside of this machine's file system."""
    return "://" in str(argument)


def endpoint_url(store: StoreSettings) -> str | None:
    """Where a store other than AWS is, by option or by AWS's variables."""
    named = (os.environ.get(name) for name in _ENDPOINTS)
    return store.storage_options.get("endpoint_url") or next(filter(None, named), None)


def explain_fault(error: BaseException) -> str | None:
    """What is wrong with the store and the remedy; None where only its own words can say it."""
    message = str(error)
    found = (said for tokens, said in _FAULTS if any(token in message for token in tokens))
    return next(found, None)


def explain_read_fault(error: BaseException) -> str | None:
    """As `explain_fault`; None also if what pyarrow read, and not the store, is at fault."""
    return explain_fault(error) if "AWS Error" in str(error) else None


def find_objects(url: str, store: StoreSettings) -> tuple[fs.FileSystem, Selection]:
    """The object itself, those of rows below a prefix, or what a glob matches, see `selection`.

    Returns the file system and paths on it. Raises NoInput if there is nothing, InputError.
    """
    try:
        place = ObjectUrl.parse(url)
        filesystem = open_filesystem(store)
        found = _find(filesystem, place)
    except ValueError as error:  # pa.ArrowInvalid is one
        raise InputError(f"cannot read from the store: {error}") from None
    except (pa.ArrowException, OSError) as error:
        reason = explain_read_fault(error) or f"{str(error).splitlines()[0][:200]}; try again"
        raise InputError(f"cannot read {url}: {reason}") from error
    if not found.names:
        raise NoInput(f"{_lacking(place, url)}; check the URL")
    return filesystem, found


def open_filesystem(store: StoreSettings) -> fs.FileSystem:
    """pyarrow's view of the store. Raises OSError."""
    options, endpoint = store.storage_options, endpoint_url(store)
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


def _find(filesystem: fs.FileSystem, place: ObjectUrl) -> Selection:
    if place.key and not place.key.endswith("/"):
        if filesystem.get_file_info(place.path).type == fs.FileType.File:
            return Selection((place.path,))
        if _WILD.search(place.key):
            return _match(filesystem, place)
    top = place.path
    found = select([path[len(top) + 1 :] for path in _list(filesystem, top)])
    return replace(found, names=tuple(f"{top}/{name}" for name in found.names))


def _match(filesystem: fs.FileSystem, place: ObjectUrl) -> Selection:
    wanted = place.path.split("/")
    fixed = next(i for i, part in enumerate(wanted) if _WILD.search(part))
    below = _list(filesystem, "/".join(wanted[:fixed]))
    matches = [path for path in below if _fits(path.split("/")[fixed:], wanted[fixed:])]
    return select_matches(place.path, matches, below)


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


def _lacking(place: ObjectUrl, url: str) -> str:
    if not place.key or place.key.endswith("/"):
        return f"there is no *.parquet or *.jsonl object below {url}"
    return f"there is no object, prefix or match for {url}"
