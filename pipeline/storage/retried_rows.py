"""Failed rows of a complete run are taken out of its parts, so that a session answers them again.

```
 sealed ─► retried.parquet: which rows, why and how often they had failed ─► seal and audit go
        ─► each part with such rows gives way to one without ─► a session like any other ─► seal
```

Rows stay in one part each, so whoever reads `data/` needs to know nothing of it, and what is left
is what is not there, as ever. Had failed rows stayed and later parts gone over them, every reader
of the files would have had to know. A retry that dies goes on where it was: rows that the record
names and that have not been tried since are still to be taken out. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import PRIOR_TURN_FAILED
from pipeline.storage.part_swap import read_part
from pipeline.storage.run_directory import RETRIED_NAME, RunDirectory
from pipeline.storage.run_tables import read_table

_COLUMNS: Final = ("id", "row_index", "error_type", "error_message", "attempts")
_REMEDY: Final = "delete it; rows that it names then count their attempts anew"
_MOST_ATTEMPTS: Final = 127  # what the column holds


def failed_in_run(directory: RunDirectory) -> pl.DataFrame:
    """Committed rows that failed while they ran, or after a turn that did: not those whose input
    was refused."""
    ran = (pl.col("attempts") > 0) | (pl.col("error_type") == PRIOR_TURN_FAILED)
    failed = directory.scan().filter((pl.col("status") == "error") & ran)
    return failed.select(_COLUMNS).sort("row_index").collect()


def is_retry(directory: RunDirectory) -> bool:
    """Whether a retry has begun here at some time."""
    return (directory.root / RETRIED_NAME).is_file()


def begin_retry(directory: RunDirectory, refused: Collection[int]) -> int:
    """Note which rows are to be answered again, and take the seal away; returns how many.

    `refused`: rows that the input itself makes fail. Nothing is done where no other is left.
    """
    rows = failed_in_run(directory).filter(~pl.col("row_index").is_in(list(refused)))
    if rows.is_empty():
        return 0
    before = _read_record(directory)
    if before is not None:
        others = before.filter(~pl.col("row_index").is_in(rows["row_index"].implode()))
        rows = pl.concat([others, rows]).sort("row_index")
    directory.write_frame(RETRIED_NAME, rows)
    directory.unseal(with_audit=True)
    return _count_left(directory, rows)


def take_back(directory: RunDirectory) -> None:
    """Take rows of the record that have not been tried since out of the parts; they are then to be
    answered as rows that nobody has answered yet. Raises StorageError."""
    attempts = attempts_before(directory)
    if not attempts:
        return
    for footer in directory.footers():
        if footer.num_error and not attempts.keys().isdisjoint(footer.row_indices.tolist()):
            table = read_part(footer)
            is_left = _is_untried(table, attempts)
            if pc.any(is_left).as_py():
                directory.replace_part(footer, table.filter(pc.invert(is_left)))


def attempts_before(directory: RunDirectory) -> dict[int, int]:
    """How often rows had failed when they were last to be answered again, by row."""
    record = _read_record(directory)
    return {} if record is None else dict(record.select("row_index", "attempts").iter_rows())


def count_attempts(table: pa.Table, before: Mapping[int, int]) -> pa.Table:
    """Rows of a part with the attempts that they had had before counted."""
    place = table.schema.get_field_index("attempts")
    rows = table.column("row_index").to_pylist()
    if before.keys().isdisjoint(rows):
        return table
    own = table.column(place).to_pylist()
    counted = [
        min(_MOST_ATTEMPTS, before[row] + 1) if row in before else attempts
        for row, attempts in zip(rows, own, strict=True)
    ]
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(counted, field.type))


def _read_record(directory: RunDirectory) -> pl.DataFrame | None:
    return read_table(directory.root / RETRIED_NAME, _COLUMNS, _REMEDY)


def _is_untried(table: pa.Table, attempts: Mapping[int, int]) -> pa.Array:
    """[rows] bool: failed, in the record, and as it stands there."""
    columns = (table.column(name).to_pylist() for name in ("row_index", "status", "attempts"))
    return pa.array(
        [
            status == "error" and attempts.get(row) == tried
            for row, status, tried in zip(*columns, strict=True)
        ],
        pa.bool_(),
    )


def _count_left(directory: RunDirectory, record: pl.DataFrame) -> int:
    failed = directory.scan().filter(pl.col("status") == "error").select("row_index", "attempts")
    return failed.collect().join(record, on=["row_index", "attempts"]).height
