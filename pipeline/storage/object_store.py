"""What a URL below `s3://` names, and what it means when its store refuses.

Every call of a store ends within about 30 seconds: one that does not answer is an error, not a job
that hangs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "s3"
CONNECT_S = 4
ANSWER_S = 8
ATTEMPTS = 3

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


def explain_fault(error: BaseException) -> str | None:
    """What is wrong with the store and the remedy; None where only its own words can say it."""
    message = str(error)
    found = (said for tokens, said in _FAULTS if any(token in message for token in tokens))
    return next(found, None)


def explain_read_fault(error: BaseException) -> str | None:
    """As `explain_fault`; None also if what pyarrow read, and not the store, is at fault."""
    return explain_fault(error) if "AWS Error" in str(error) else None
