"""What a publication holds, and `published.json`, which says so. Knows no folder and no store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NotRequired

from typing_extensions import TypedDict

from pipeline.errors import StorageError
from pipeline.storage.json_file import Count, Digits, JsonFile
from pipeline.storage.part_file import PART_NAME, hash_file


class _File(TypedDict):
    bytes: Count
    sha256: Digits


class _Marker(TypedDict):
    edition: str
    files: dict[str, _File]
    job: NotRequired[str]
    run_id: NotRequired[str]
    run_created_at: NotRequired[str]
    sessions: NotRequired[Count]


MARKER: Final = JsonFile(_Marker, "published.json", "move its folder away to publish there")


@dataclass(frozen=True)
class Content:
    """`files`: relative name -> where it is now; `replaces`: what `published.json` says there."""

    described: dict[str, Any]
    files: dict[str, Path]
    replaces: dict[str, Any] | None

    @property
    def edition(self) -> str:
        """Names this content; the same content has the same name."""
        return str(self.described["edition"])


def describe_file(path: Path, name: str) -> dict[str, Any]:
    """Bytes and sha256 of a file. Raises StorageError if a part is not what its name says."""
    digest = hash_file(path)
    part = PART_NAME.fullmatch(name.rsplit("/", 1)[-1])
    if part is not None and not digest.startswith(part[2]):
        raise StorageError(
            f"{name} was altered after it was written; run the same job again: its rows will be "
            "computed anew"
        )
    return {"bytes": path.stat().st_size, "sha256": digest}


def marker(described: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    """The bytes of `published.json`."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps(described | {"published_at": at, "files": files}, indent=2)
    return f"{text}\n".encode()
