"""What a URL of an object store names, and which options its store takes. Asks nobody."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pipeline.errors import UsageError
from pipeline.location import Location

BUCKETS: Final = ("s3", "gs", "az")
"""Schemes of stores that have folders, and that can be written to."""
WEB: Final = ("https", "http")
_OPTIONS: Final = {
    "s3": {"region", "anonymous", "access_key_id", "secret_access_key", "session_token"},
    "gs": {"anonymous", "service_account"},
    "az": {"anonymous", "account_name", "account_key", "sas_token"},
    "hf": {"token"},
}


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """`s3://bucket/key`, `gs://` or `az://`; the key may be empty, end in a slash or hold
    wildcards. What Azure calls a container is a bucket here."""

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, text: str) -> ObjectUrl:
        """Raises ValueError with a sentence that does not quote what may be a password."""
        scheme, _, rest = text.partition("://")
        if scheme not in BUCKETS:
            known = ", ".join(f"{name}://" for name in BUCKETS[:-1])
            raise ValueError(f"{scheme}:// is not supported; use a folder, {known} or az://")
        bucket, _, key = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._$-]+", bucket):
            raise ValueError(
                f"a URL must look like {scheme}://bucket/name; credentials belong to the "
                "environment or to --storage-options"
            )
        return cls(scheme, bucket, key)

    @property
    def root(self) -> str:
        """The URL of the bucket."""
        return f"{self.scheme}://{self.bucket}"


def check_options(*locations: Location) -> None:
    """Raises UsageError for an option that no store of these takes, where there is a store."""
    schemes = sorted({location.scheme for location in locations if location.is_remote})
    known = {name for scheme in schemes for name in _OPTIONS.get(scheme, set())}
    known |= {"endpoint_url"} if known else set()
    for location in locations:
        strange = sorted(location.store.storage_options.keys() - known)
        if schemes and strange:
            named = " and ".join(f"{scheme}://" for scheme in schemes)
            raise UsageError(f"--storage-options {strange[0]} says nothing of {named}; drop it")
