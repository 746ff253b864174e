"""Blocks of rows that were decoded lately, up to a number of bytes. Knows no files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Read = Callable[[], Iterator[pa.Table]]


class BlockCache:
    """Decoded blocks, the least recently used dropped first; always room for one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self.num_bytes = 0

    def take(
        self, block: int, rows: NDArray[np.int64], read: Read, most_bytes: int
    ) -> Iterator[pa.Table]:
        """These rows of a block, ascending; from the slices of `read` if it is not here.

        A block that proves larger than `most_bytes` is not kept but read each time.
        """
        table = self._tables.pop(block, None)
        if table is None:
            pieces: list[pa.Table] = []
            size, slices = 0, read()
            for piece in slices:
                pieces.append(piece)
                size += piece.nbytes
                if size > most_bytes:
                    yield from _take_in_passing(rows, chain(pieces, slices))
                    return
            table = pa.concat_tables(pieces).combine_chunks()  # of many chunks each take is slow
            self.num_bytes += table.nbytes
        self._tables[block] = table
        while len(self._tables) > 1 and self.num_bytes > self._max_bytes:
            self.num_bytes -= self._tables.popitem(last=False)[1].nbytes
        yield table.take(pa.array(rows))


def _take_in_passing(rows: NDArray[np.int64], slices: Iterable[pa.Table]) -> Iterator[pa.Table]:
    start = 0
    for piece in slices:
        stop = start + piece.num_rows
        low, high = np.searchsorted(rows, [start, stop])
        if high > low:
            yield piece.take(pa.array(rows[low:high] - start))
        if high == len(rows):
            return
        start = stop
