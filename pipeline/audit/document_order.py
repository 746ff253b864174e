"""Prompts as a run had them where it listed the documents of each row in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import RunDirectoryError
from pipeline.storage.run_directory import PLAN_NAME, RunDirectory

Ids = NDArray[np.uint32]


def in_order_of_run(
    directory: RunDirectory,
    rows: Sequence[int],
    prompts: Sequence[Ids],
    segments: Mapping[int, Sequence[int]],
) -> list[Ids]:
    """`prompts` of these rows, ascending, as the input has them; `segments`: the tokens of each, by
    place in `prompts`. Raises RunDirectoryError where the plan does not say the order."""
    path = directory.root / PLAN_NAME
    try:
        plan = pl.scan_parquet(path, glob=False).filter(pl.col("row_index").is_in(list(rows)))
        orders = plan.sort("row_index").select("document_order").collect().to_series().to_list()
        return [_reorder(p, segments[i], orders[i]) for i, p in enumerate(prompts)]
    except (OSError, pl.exceptions.PolarsError, LookupError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} does not say in which order the documents of each row stood; run the job again"
        ) from error


def _reorder(prompt: Ids, lengths: Sequence[int], order: Sequence[int]) -> Ids:
    first, *documents, last = np.split(prompt, np.cumsum(lengths)[:-1])
    if sorted(order) != list(range(len(documents))):
        raise LookupError
    return np.concatenate([first, *(documents[number] for number in order), last])
