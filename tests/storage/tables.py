"""Output tables with nothing in them that matters but rows, ids and statuses."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipeline.storage.schema import OUTPUT_FIELDS


def answers(rows: Sequence[int], failed: Sequence[int] = (), prefix: str = "r") -> pa.Table:
    """One answer for each row number."""
    records = [
        {
            "id": f"{prefix}{row}",
            "row_index": row,
            "generated_text": None if row in failed else f"text {row}",
            "status": "error" if row in failed else "ok",
            "attempts": 1,
            "completion_token_ids": [row, row + 1],
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=pa.schema(OUTPUT_FIELDS))
