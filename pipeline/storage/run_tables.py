"""The small tables of a run directory: plan and audit. Knows nothing about the parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.errors import RunDirectoryError


def read_table(path: Path, columns: Sequence[str], remedy: str) -> pl.DataFrame | None:
    """These columns of a Parquet file; None if it is not there. Raises RunDirectoryError."""
    if not path.is_file():
        return None
    try:
        return pl.scan_parquet(path, glob=False).select(columns).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunDirectoryError(f"{path} is damaged ({type(error).__name__}); {remedy}") from error
