"""What run.json in a store says about the parts there. Knows nothing about how they get there."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.storage.json_file import Count
from pipeline.storage.part_file import PART_NAME, PartFooter

PartName = Annotated[str, Field(pattern=f"^{PART_NAME.pattern}$")]
"""Before it is joined to a path, a name from elsewhere must be one that we make."""


class Part(TypedDict):
    """What run.json says of a part."""

    bytes: Count
    rows_ok: Count
    rows_error: Count


def part_file(name: str) -> str:
    """Where a part is, from the run's own prefix."""
    assert PART_NAME.fullmatch(name), name
    return f"data/{name}"


def describe_parts(*footers: PartFooter) -> dict[str, Any]:
    """What run.json says about these parts, by name."""
    return {
        footer.path.name: {
            "bytes": footer.path.stat().st_size,
            "rows_ok": footer.num_ok,
            "rows_error": footer.num_error,
        }
        for footer in footers
    }


def named_parts(manifest: dict[str, Any], present: dict[str, int]) -> dict[str, Any]:
    """The parts of a run; one that was copied here from a folder names none, so all count."""
    names = {name.removeprefix("data/"): size for name, size in present.items()}
    listed = {n: {"bytes": size} for n, size in names.items() if PART_NAME.fullmatch(n)}
    parts: dict[str, Any] = manifest.get("parts", listed)
    return parts


def is_stored(name: str, part: dict[str, Any], present: dict[str, int]) -> bool:
    """Whether a part is among the files `present`, with all of its bytes."""
    return bool(present.get(part_file(name)) == part["bytes"])
