"""Prompts whose documents stand in the order in which rows share most. Keeps no text.

The documents of a row are tokenised apart, so another order is the same ids in other places.
"""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.job.prepared_rows import disk_errors
from pipeline.plan.document_order import best_order
from pipeline.plan.segment_table import Segments, number_segments
from pipeline.plan.sorting import sort_rows
from pipeline.plan.token_table import TokenFile, TokenTable

_ROW_BYTES, _SEGMENT_BYTES = 500, 100  # of memory, measured


class OrderedRows(NamedTuple):
    """Rows whose documents were put in another order; `places`: [segments] where each stood;
    `given`: the rows as they were."""

    given: TokenTable
    table: TokenTable
    segments: Segments
    places: NDArray[np.int64]

    def numbers(self) -> pl.Series:
        """Of each row, its documents by the numbers that they had; empty where it has none."""
        bounds = self.segments.bounds
        is_document = self.segments.are_documents(np.arange(len(bounds) - 1))
        counts = np.maximum(np.diff(bounds) - 2, 0)
        row = np.repeat(np.arange(len(counts)), counts)
        numbers = self.places[is_document] - bounds[row] - 1
        offsets = np.append(0, np.cumsum(counts))
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(numbers, pa.int32()))
        return pl.Series(lists)


def memory_needed(segments: Segments) -> int:
    """Bytes that `order_documents` takes, at most."""
    return _ROW_BYTES * (len(segments.bounds) - 1) + _SEGMENT_BYTES * len(segments.lengths)


def check_memory(segments: Segments, plan_memory: int) -> None:
    """Raises UsageError where there is less than `order_documents` takes."""
    needed = memory_needed(segments)
    if needed > plan_memory:
        raise UsageError(
            f"--document-order best takes {needed / 2**30:.1f} GiB for these rows; give it "
            f"--plan-memory {-(-needed // 2**30)}GiB"
        )


def order_documents(
    table: TokenTable, segments: Segments, tenant: NDArray[np.integer]
) -> OrderedRows:
    """The same rows, their documents in `best_order`. Raises StorageError where the disk is full.

    `tenant`: [rows] as for `build_plan`.
    """
    places = _best_places(table, segments, tenant)
    ordered = Segments(segments.bounds, segments.lengths[places])
    starts = segments.starts(table)[places]
    with disk_errors():
        file = TokenFile(tempfile.TemporaryFile(), table.flat.dtype)
        for low, high in table.chunks():
            first, stop = segments.bounds[[low, high]]
            lengths = ordered.lengths[first:stop]
            into = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids = table.flat[np.repeat(starts[first:stop], lengths) + into]
            file.append(ids, table.lengths[low:high])
        return OrderedRows(table, file.finish(), ordered, places)


def count_distinct_tokens(table: TokenTable, tenant: NDArray[np.integer]) -> int:
    """Tokens of the tree over all rows: what is computed where prefixes alone are shared."""
    order, shared = sort_rows(table, tenant.astype(np.int64))
    return int((table.lengths[order] - shared).sum())


def _best_places(
    table: TokenTable, segments: Segments, tenant: NDArray[np.integer]
) -> NDArray[np.int64]:
    """[segments] which segment stands at each place."""
    places, bounds = np.arange(len(segments.lengths)), segments.bounds
    rows = np.flatnonzero(np.diff(bounds) > 2)
    first, last = bounds[rows], bounds[rows + 1] - 1
    chosen = np.ones(len(places), bool)
    chosen[last] = False  # no two questions need be told apart
    number = number_segments(table, segments, chosen).number
    tokens = np.zeros(number.max(initial=0) + 1, np.int64)
    tokens[number[chosen]] = segments.lengths[chosen]
    above = np.stack([tenant[rows].astype(np.int64), number[first]], 1)
    _, group = np.unique(above, axis=0, return_inverse=True)
    spans = list(zip((first + 1).tolist(), last.tolist(), strict=True))
    flat = number.tolist()
    documents = [flat[low:high] for low, high in spans]
    ordered = best_order(documents, tokens.tolist(), group.tolist())
    for (low, high), given, wanted in zip(spans, documents, ordered, strict=True):
        if given == wanted:
            continue
        where: dict[int, list[int]] = {}
        for place in range(high - 1, low - 1, -1):
            where.setdefault(flat[place], []).append(place)
        places[low:high] = [where[document].pop() for document in wanted]
    return places
