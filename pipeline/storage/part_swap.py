"""One part takes the place of another one. Knows nothing about why.

```
 part-00003-a1….parquet ─► .part-00003-a1….parquet.aside     hidden, and of no reader's ending
                           part-00003-b2….parquet             the new one, where rows are left
                           ✗                                  the old one goes
```

No reader ever finds a row twice. After a crash `put_back` finds the old part, and puts it back
unless the new one is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.private_folder import sync_folder
from pipeline.storage.durable import write_errors
from pipeline.storage.part_file import PART_NAME, PartFooter, read_part_footer, write_part

_ENDING = ".aside"


def read_part(footer: PartFooter) -> pa.Table:
    """The rows of a part. Raises StorageError."""
    with write_errors(footer.path), pq.ParquetFile(footer.path) as file:
        return file.read().replace_schema_metadata(None)  # the footer says another part's rows


def swap_part(footer: PartFooter, table: pa.Table) -> None:
    """Commit `table` as the part in the place of another one; of no rows, none. Raises StorageError
    with the old part where it was, or hidden until `put_back`."""
    path = footer.path
    aside = path.with_name(f".{path.name}{_ENDING}")
    with write_errors(path):
        os.replace(path, aside)
        sync_folder(path.parent)
    if table.num_rows:
        write_part(path.parent, footer.number, table, footer.provenance)
    with write_errors(aside):
        aside.unlink()
        sync_folder(path.parent)


def put_back(folder: Path, read_footers: Callable[[], list[PartFooter]]) -> None:
    """Finish what was interrupted: old parts come back, or go where a new one has their rows.

    `read_footers`: of the committed parts. Raises StorageError.
    """
    hidden = [
        path
        for path in sorted(folder.glob(f".*{_ENDING}"))
        if PART_NAME.fullmatch(path.name[1 : -len(_ENDING)])
    ]
    for path in hidden:
        shown = path.with_name(path.name[1 : -len(_ENDING)])
        committed = [np.zeros(0, np.int64), *(footer.row_indices for footer in read_footers())]
        with write_errors(path):
            os.replace(path, shown)
            rows = read_part_footer(shown).row_indices
            if np.isin(rows, np.concatenate(committed)).any():
                shown.unlink()
            sync_folder(folder)
