"""Where something is and how it is reached, as one record. Opens nothing and asks nobody."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store_settings import ObjectStoreSettings

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


def is_url(argument: object) -> bool:
    """Whether this names something outside of this machine's file system."""
    return "://" in str(argument)


@dataclass(frozen=True)
class Location:
    """A path of this machine, or a URL and how its object store is reached.

    As text it is what a person wrote; the options of the store, which may be secret, are in none.
    """

    path: str | Path
    store: ObjectStoreSettings = field(default=ObjectStoreSettings(), repr=False)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_remote(self) -> bool:
        """Whether it is outside of this machine's file system."""
        return is_url(self.path)

    @property
    def scheme(self) -> str:
        """What a URL begins with; empty for a path of this machine."""
        scheme, mark, _ = str(self.path).partition("://")
        return scheme if mark else ""

    @property
    def local(self) -> Path:
        """The path on this machine, of what is not remote."""
        return Path(self.path)

    @property
    def absolute(self) -> str:
        """A text that means the same from any working directory."""
        return str(self) if self.is_remote else os.path.abspath(self.path)

    @property
    def canonical(self) -> str:
        """One text for all paths of the same file, and for all URLs of the same folder."""
        return str(self).rstrip("/") if self.is_remote else os.path.realpath(self.path)

    @property
    def endpoint(self) -> str | None:
        """Where a store is that is not where its scheme says, by option or by variables."""
        variables = _ENDPOINTS.get(self.scheme, ())
        named = (os.environ.get(name) for name in variables)
        return self.store.storage_options.get("endpoint_url") or next(filter(None, named), None)

    def overlaps(self, other: Location) -> bool:
        """Whether one is the other, or lies in it."""
        here, there = f"{self.canonical}/", f"{other.canonical}/"
        return here.startswith(there) or there.startswith(here)
