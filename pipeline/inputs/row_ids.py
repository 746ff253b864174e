"""What rows are called: ids of those that bring none, and ids that come twice."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl

from pipeline.errors import InputError
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.parquet_input import ParquetInput


def find_duplicate_ids(ids: pl.Series, at_most: int = 5) -> list[str]:
    """The first few ids that occur more than once, in order of appearance."""
    twice = ids.filter(ids.is_duplicated())
    found: list[str] = twice.unique(maintain_order=True).head(at_most).to_list()
    return found


def refuse_duplicate_ids(ids: pl.Series) -> None:
    """Raises InputError where an id comes twice."""
    duplicates = find_duplicate_ids(ids)
    if duplicates:
        raise InputError(
            f"ids must be unique, but these come twice: {', '.join(duplicates)}; "
            "make them unique or choose another column with --id-column"
        )


def ids_of_places(file: ParquetInput, label: str, start: int, stop: int) -> list[str]:
    """Rows `[start, stop)` of the file named by their place in it."""
    groups, rows = file.places(start, stop)
    places = zip(groups.tolist(), rows.tolist(), strict=True)
    return [f"{label}:{group}:{row}" for group, row in places]


def make_labels(files: Sequence[InputFile]) -> tuple[str, ...]:
    """Base names for ids; where two are equal, paths from the folder that all files share."""
    names = tuple(file.base_name for file in files)
    if len(set(names)) == len(names):
        return names
    top = os.path.commonpath([os.path.dirname(file.path) for file in files])
    return tuple(os.path.relpath(file.path, top) for file in files)
