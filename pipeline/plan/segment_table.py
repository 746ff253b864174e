"""Which segments of prompts are the same: all of them numbered by their ids. Knows no modes.

The bytes of a table are looked at where they lie, some at a time; only distinct ones are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.plan.token_table import TokenTable


@dataclass(frozen=True, eq=False)
class Segments:
    """Row i of a token table consists of `lengths[bounds[i] : bounds[i + 1]]` tokens: of its
    preamble (0: none), of each document, of its question. int64; a row that cannot run has none."""

    bounds: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> Segments:
        """`rows[i]`: the lengths of row i."""
        bounds = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
        return cls(bounds, np.array([length for row in rows for length in row], np.int64))

    def of(self, row: int) -> NDArray[np.int64]:
        return self.lengths[self.bounds[row] : self.bounds[row + 1]]

    def kinds(self) -> NDArray[np.int64]:
        """[rows] numbers that are equal where rows are cut alike."""
        width = self.lengths.dtype.itemsize
        cuts = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self.bounds) - 1,
            [None, pa.py_buffer(self.bounds * width), pa.py_buffer(self.lengths)],
        )  # fmt: skip
        numbers: NDArray[np.int64] = pl.Series(cuts).rank("dense").to_numpy().astype(np.int64)
        return numbers

    def are_documents(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[segments] whether each is a document of one of `rows`."""
        row = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        place = np.arange(len(self.lengths))
        is_wanted = np.zeros(len(self.bounds) - 1, bool)
        is_wanted[rows] = True
        is_inside = (place > self.bounds[row]) & (place < self.bounds[row + 1] - 1)
        chosen: NDArray[np.bool_] = is_inside & is_wanted[row]
        return chosen

    def starts(self, table: TokenTable) -> NDArray[np.int64]:
        """[segments] where each begins in the table's `flat`."""
        row = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        upto = np.cumsum(self.lengths) - self.lengths
        first = np.append(upto, 0)[self.bounds[row]]
        starts: NDArray[np.int64] = table.offsets[row] + upto - first
        return starts


@dataclass(frozen=True, eq=False)
class DistinctSegments:
    """`number`: [segments] int64, -1 of those that were not asked for; `ids[n]`: of number n."""

    number: NDArray[np.int64]
    ids: list[NDArray[np.int64]]


def number_segments(
    table: TokenTable, segments: Segments, chosen: NDArray[np.bool_]
) -> DistinctSegments:
    """`chosen`: [segments] which are to be told apart. Numbers come in order of appearance."""
    number = np.full(len(segments.lengths), -1, np.int64)
    starts, known = segments.starts(table), dict[bytes, int]()
    for low, high in table.chunks():
        first, stop = segments.bounds[[low, high]]
        here = np.flatnonzero(chosen[first:stop])
        if not len(here):
            continue
        # Between a segment and the next lies nothing, or what fills a row up to a whole word.
        borders = np.empty(2 * (stop - first) + 1, np.int64)
        borders[:-1:2] = starts[first:stop] - table.offsets[low]
        borders[1::2] = borders[:-1:2] + segments.lengths[first:stop]
        borders[-1] = borders[-2]
        pieces = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(borders) - 1,
            [None, pa.py_buffer(borders * table.flat.dtype.itemsize),
             pa.py_buffer(table.read_words(low, high))],
        )  # fmt: skip
        found = pieces.take(pa.array(2 * here)).dictionary_encode()
        numbers = [known.setdefault(ids, len(known)) for ids in found.dictionary.to_pylist()]
        number[first + here] = np.array(numbers, np.int64)[found.indices.to_numpy()]
    ids = [np.frombuffer(some, table.flat.dtype).astype(np.int64) for some in known]
    return DistinctSegments(number, ids)
