"""The parts of a run as rows for a person. Knows nothing about who looks at them."""

from __future__ import annotations

from typing import Any

from pipeline.night.settings import Night
from pipeline.storage.part_list import describe_parts
from pipeline.storage.run_location import reading_run

_MOST_ROWS = 200


def part_table(night: Night, most_rows: int = _MOST_ROWS) -> list[dict[str, Any]]:
    """One row a part, at most `most_rows`: the oldest ones share the first. Also while it runs.

    Raises RunDirectoryError, StorageError.
    """
    with reading_run(night.run, parts=False) as run:
        # Below s3:// run.json lists the parts, which are not fetched; here they speak themselves.
        parts = run.read_manifest().get("parts") or describe_parts(*run.footers())
    names = sorted(parts)
    num_summed = len(names) - most_rows + 1 if len(names) > most_rows else 0
    first = [_row(f"the first {num_summed} parts", *map(parts.get, names[:num_summed]))]
    return first[: min(num_summed, 1)] + [_row(name, parts[name]) for name in names[num_summed:]]


def _row(name: str, *parts: Any) -> dict[str, Any]:
    total = {key: sum(part[key] for part in parts) for key in ("rows_ok", "rows_error", "bytes")}
    return {
        "part": name,
        "rows answered": total["rows_ok"],
        "rows failed": total["rows_error"],
        "MiB": round(total["bytes"] / 2**20, 2),
    }
