"""What it means when a store or a web server refuses: obstore's errors as clauses for people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pipeline.storage.object_store import BUCKETS

_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}
# What is in a message of a store or of obstore -> what it means for a person.
_FAULTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"),
        "there is no such bucket; check its name and {address}",
    ),
    (
        ("PermanentRedirect", "redirect without LOCATION", "AuthorizationHeaderMalformed"),
        "the bucket is in another region; name it by --storage-options region=...",
    ),
    (
        ("Account must be specified", "MissingAccount", "Missing account"),
        "no storage account is named; set AZURE_STORAGE_ACCOUNT_NAME or --storage-options "
        "account_name=...",
    ),
    (
        (
            "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
            "InvalidToken", "AuthenticationFailed", "AuthorizationFailure", "401 Unauthorized",
            "403 Forbidden", "169.254.169.254", "metadata.google.internal", "credential",
            "decoding service account", "private key",
        ),
        "the store refuses the credentials; check {credentials}, and what they may do",
    ),
    (
        ("Content-Length Header missing",),
        "its server does not say how long the file is; download it first",
    ),
    (
        ("status code: 5",),
        "its server answers with a fault of its own; try again later",
    ),
    (
        ("status code: 429", "SlowDown"),
        "its server takes no more questions for now; try again later",
    ),
    (
        ("Could not parse path",),
        "its path has an empty part, '.' or '..', or a character that no store takes; write it "
        "without",
    ),
    (
        ("status code: 4",),
        "its server does not give it; check {address}",
    ),
    (
        ("InvalidCertificate",),
        "its certificate is signed by nobody that this machine trusts; name the file of who signed "
        "it by SSL_CERT_FILE",
    ),
    (
        (
            "error sending request", "timed out", "error decoding response body",
            "connection closed", "Connection refused", "ConnectionReset",
            "response body error",
        ),
        "the store cannot be reached; check the network and {address}",
    ),
)  # fmt: skip
_ON_WEB = (
    (
        ("status code: 3", "redirect"),
        "its server sends on to another place, and there is no file; check {address}",
    ),
)
"""Before these: of a bucket a redirect means its region."""
_KINDS = {  # of obstore's errors, where the text says too little
    "PermissionDeniedError": "AccessDenied",
    "UnauthenticatedError": "AccessDenied",
}
_READ_FAULTS = {
    "PreconditionError": "it changed while it was being read; start again",
    "NotSupportedError": "its server gives no parts of files, as Parquet needs; download it first",
}
_QUERY = re.compile(r"\?\S+")  # of a URL, which may hold a signature


class StoreFault(OSError):
    """A store does not give what it is asked for; the message is a clause with the remedy."""


def explain_fault(error: BaseException, scheme: str = "s3") -> str:
    """What is wrong with the store and the remedy, as a clause."""
    kind, message = type(error).__name__, str(error)
    if kind in _READ_FAULTS:
        return _READ_FAULTS[kind]
    message += _KINDS.get(kind, "")
    for tokens, said in _FAULTS if scheme in BUCKETS else (*_ON_WEB, *_FAULTS):
        if any(token in message for token in tokens):
            address = "--storage-options endpoint_url" if scheme in BUCKETS else "the URL"
            credentials = _CREDENTIALS.get(scheme, "the URL")
            return said.format(credentials=credentials, address=address)
    first = _QUERY.sub("?...", next(iter(message.splitlines()), "")) or kind
    return f"{first[:200]}; try again"


def is_missing(error: BaseException) -> bool:
    """Whether it says that an object is not there, and not that its bucket is not."""
    return isinstance(error, FileNotFoundError) and not any(
        token in str(error) for token in _FAULTS[0][0]
    )


@contextmanager
def store_faults(scheme: str) -> Iterator[None]:
    """Turn what obstore raises into a StoreFault; an object that is not there stays what it is."""
    try:
        yield
    except FileNotFoundError as error:
        if is_missing(error):
            raise FileNotFoundError("it is not there") from None
        raise StoreFault(explain_fault(error, scheme)) from error
    except (KeyboardInterrupt, SystemExit, StoreFault):
        raise
    except Exception as error:
        raise StoreFault(explain_fault(error, scheme)) from error
