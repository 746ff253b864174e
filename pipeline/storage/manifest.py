"""run.json: which run a folder holds. Knows nothing about its parts.

The fingerprint is all that changes the text of an answer; its hash is the run's id.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import RunDirectoryError
from pipeline.storage.schema import SCHEMA_VERSION

MANIFEST_NAME = "run.json"
_HASHES = ("input", "model", "revision", "tokenizer")
_SHOWN_CHARACTERS = 32  # of each value, where two fingerprints differ


def new_manifest(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fields that every run begins with."""
    canonical = json.dumps(fingerprint, sort_keys=True, allow_nan=False)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": hashlib.sha256(canonical.encode()).hexdigest()[:16],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "fingerprint": fingerprint,
        "counters": {},
        "sessions": [],
    }


def read_manifest(root: Path) -> dict[str, Any]:
    """run.json of a folder. Raises RunDirectoryError if missing, damaged, too new or too old."""
    path = root / MANIFEST_NAME
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version, _ = manifest["schema_version"], (manifest["run_id"], manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{root} holds no run (no readable {MANIFEST_NAME}); check the path"
        ) from error
    if version != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{path} has the version {version}, not {SCHEMA_VERSION}; use the coppice that made it"
        )
    return manifest


def check_fingerprint(root: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RunDirectoryError naming the first field in which two fingerprints differ."""
    wanted = _flatten(json.loads(json.dumps(wanted)))  # as it would be read back: tuples are lists
    held = _flatten(held)
    # Another setting can change a hash as well, and the setting is what a person can put back.
    for field in sorted(held.keys() | wanted.keys(), key=lambda name: (name in _HASHES, name)):
        if held.get(field) != wanted.get(field):
            raise RunDirectoryError(
                f"{root} holds a run with another {field} ({_shorten(held.get(field))}, now "
                f"{_shorten(wanted.get(field))}); choose a new folder or go back to the old value"
            )


def _flatten(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fields of a nested record (`sampling`) beside the others: their names are unique."""
    fields: dict[str, Any] = {}
    for name, value in fingerprint.items():
        fields |= value if isinstance(value, dict) else {name: value}
    return fields


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
