"""run.json: which run a folder holds. Knows nothing about its parts.

The fingerprint is all that changes the text of an answer; its hash is the run's id.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.errors import RunDirectoryError
from pipeline.storage.json_file import Count, JsonFile, Number
from pipeline.storage.part_list import Part, PartName
from pipeline.storage.schema import SCHEMA_VERSION

MANIFEST_NAME = "run.json"
STORE_FIELDS = frozenset({"parts", "writer"})  # see `remote_run`; in a folder the parts say it all
_HASHES = ("input", "model", "revision", "tokenizer")
_SHOWN_CHARACTERS = 32  # of each value, where two fingerprints differ


class _Input(TypedDict):
    argument: NotRequired[str]
    rows: Count


class _Engine(TypedDict):
    name: str
    notes: list[str]


class _Session(TypedDict, total=False):
    prefilled_tokens: Count
    loaded_tokens: Count
    generated_tokens: Count
    peak_kv_bytes: Count
    wall_s: Number
    prefill_s: Number
    decode_s: Number
    load_s: Number
    busy_s: Number
    span_s: Number


class _Agreement(TypedDict):
    rows: Count
    same: Count
    of_rows: Count
    lower_bound: Number
    mean_kl: Number | None
    same_choice: Number | None


class _AgreementOf(_Agreement):
    documents: Count


class _Cost(TypedDict):
    seconds: Number
    prefilled_tokens: Count
    generated_tokens: Count


class _Calibration(TypedDict):
    mode: str
    asked_rows: Count
    decision: Literal["reuse", "fallback", "abort", "warn", "skipped"]
    reasons: list[str]
    agreement: _Agreement
    by_documents: list[_AgreementOf]
    cost: _Cost


class _Writer(TypedDict):
    name: str
    session: NotRequired[str]


class _Question(TypedDict):
    name: Annotated[str, Field(pattern=r"^\w{1,100}$")]
    kind: Literal["choice", "scale", "boolean"]
    labels: list[str]


class _Manifest(TypedDict):
    schema_version: Count
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    created_at: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.+Z-]{8,30}$")]
    status: Literal["running", "complete", "stopped", "failed"]
    fingerprint: dict[str, Any]
    counters: dict[str, Number]
    sessions: list[_Session]
    settings: NotRequired[dict[str, dict[str, Any]]]
    versions: NotRequired[dict[str, Any]]
    device: NotRequired[dict[str, Any]]
    input: NotRequired[_Input]
    engine: NotRequired[_Engine]
    notes: NotRequired[list[str]]
    calibration: NotRequired[_Calibration]
    questions: NotRequired[list[_Question]]
    parts: NotRequired[dict[PartName, Part]]
    writer: NotRequired[_Writer]


_MANIFEST: Final = JsonFile(
    _Manifest, MANIFEST_NAME, "bring a copy of it back, or move the folder away and run again"
)


def new_manifest(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fields that every run begins with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id_of(fingerprint),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "fingerprint": fingerprint,
        "counters": {},
        "sessions": [],
    }


def run_id_of(fingerprint: dict[str, Any]) -> str:
    """16 hex digits of the fingerprint's hash."""
    canonical = json.dumps(fingerprint, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_manifest(root: Path) -> dict[str, Any]:
    """run.json of a folder. Raises RunDirectoryError if missing, damaged, too new or too old."""
    try:
        content = (root / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise no_run(root) from error
    return parse_manifest(content, root)


def parse_manifest(content: bytes, path: str | Path) -> dict[str, Any]:
    """The content of run.json in `path`. Raises RunDirectoryError as `read_manifest`."""
    try:
        manifest = json.loads(content)
        version, _ = manifest["schema_version"], (manifest["run_id"], manifest["fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise no_run(path) from error
    if type(version) is int and version != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{path}/{MANIFEST_NAME} has the version {version}, not {SCHEMA_VERSION}; "
            "use the coppice that made it"
        )
    return _MANIFEST.parse(content, path)


def notes_of(manifest: dict[str, Any]) -> list[str]:
    """What a person should know of a run, of its last session; its engine's notes last."""
    return [*manifest.get("notes", []), *manifest.get("engine", {}).get("notes", [])]


def no_run(path: str | Path) -> RunDirectoryError:
    """Of a folder or URL where there is none."""
    return RunDirectoryError(f"{path} holds no run (no readable {MANIFEST_NAME}); check the path")


def check_fingerprint(path: str | Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RunDirectoryError naming the first field in which two fingerprints differ."""
    wanted = _flatten(json.loads(json.dumps(wanted)))  # as it would be read back: tuples are lists
    held = _flatten(held)
    # Another setting can change a hash as well, and the setting is what a person can put back.
    for field in sorted(held.keys() | wanted.keys(), key=lambda name: (name in _HASHES, name)):
        if held.get(field) != wanted.get(field):
            raise RunDirectoryError(
                f"{path} holds a run with another {field} ({_shorten(held.get(field))}, now "
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
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return text[: _SHOWN_CHARACTERS - 2] + "…" + text[-1]  # with its last quote or bracket
