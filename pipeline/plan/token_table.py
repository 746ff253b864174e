"""Token ids of many prompts in one array, in memory or in a file. Knows nothing about text.

Ids are big-endian, and every row begins at a multiple of eight bytes with zeros before it: so bytes
sort as the ids do, and two rows are compared a word at a time.

```
 flat   | 5 7 9 0 | 5 7 2 8 | 6 0 0 0 |      uint16: four slots a word
 row 0    5 7 9
 row 1              5 7 2 8 | 6
```
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StorageError

Ids = NDArray[np.unsignedinteger]
Batch = tuple[Ids, Sequence[int] | NDArray[np.int64]]
"""Ids end to end, in any byte order, and the length of each row."""

WORD_BYTES = 8
CHUNK_BYTES = 16 << 20
"""Read at a time where the whole table is gone through."""


def narrowest_dtype(vocabulary_size: int) -> np.dtype[np.unsignedinteger]:
    """Big-endian uint16 where every id fits, else uint32."""
    return np.dtype(">u2" if vocabulary_size <= 2**16 else ">u4")


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Row i holds `flat[offsets[i] : offsets[i] + lengths[i]]`; an empty row cannot run.

    `flat`: [slots] big-endian uint16 or uint32, an array or mapped from `file`; `offsets`:
    [rows + 1] int64, the last one is the number of slots; `lengths`: [rows] int64.
    """

    flat: Ids
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    file: BinaryIO | None = None

    @classmethod
    def of(cls, flat: Ids, lengths: NDArray[np.int64], file: BinaryIO | None = None) -> TokenTable:
        """`flat` as `pad_rows` makes it, for rows of these lengths."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(_padded(lengths, flat.dtype), out=offsets[1:])
        return cls(flat, offsets, lengths, file)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], vocabulary_size: int = 2**32) -> TokenTable:
        """For tests and small tables."""
        dtype = narrowest_dtype(vocabulary_size)
        arrays = [np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)]
        flat = np.concatenate(arrays, dtype=dtype)
        return cls.from_batches([(flat, [len(row) for row in rows])], dtype)

    @classmethod
    def from_batches(
        cls, batches: Iterable[Batch], dtype: np.dtype[np.unsignedinteger]
    ) -> TokenTable:
        """Join batches, in order, in memory."""
        flats, lengths = [np.zeros(0, dtype)], [np.zeros(0, np.int64)]
        for flat, length in batches:
            lengths.append(np.asarray(length, np.int64))
            flats.append(pad_rows(flat, lengths[-1], dtype))
        return cls.of(np.concatenate(flats, dtype=dtype), np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Ids:
        low = self.offsets[row]
        return self.flat[low : low + self.lengths[row]]

    def take(self, rows: NDArray[np.int64]) -> TokenTable:
        """These rows, in memory, each with the zeros that follow it."""
        low, high = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        slots = [self.flat[a:b] for a, b in zip(low, high, strict=True)]
        return TokenTable.of(np.concatenate([self.flat[:0], *slots]), self.lengths[rows])

    def read_words(self, low: int, high: int) -> NDArray[np.uint64]:
        """Rows `[low, high)` as words of eight bytes, as they lie in memory.

        A mapped file is read, not looked at: what stays resident is what the caller keeps. For one
        thread at a time.
        """
        first, stop = int(self.offsets[low]), int(self.offsets[high])
        if self.file is None:
            return self.flat[first:stop].view(np.uint64)
        size = self.flat.dtype.itemsize
        words = np.empty((stop - first) * size // WORD_BYTES, np.uint64)
        self.file.seek(first * size)
        if self.file.readinto(words.data) != words.nbytes:  # type: ignore[attr-defined]
            raise StorageError("the file of token ids ended early; is its disk full or gone?")
        return words

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges `[low, high)` that tile the table, each of about `CHUNK_BYTES`."""
        slots = max(1, CHUNK_BYTES // self.flat.dtype.itemsize)
        low = 0
        while low < len(self):
            high = int(np.searchsorted(self.offsets, self.offsets[low] + slots, side="right")) - 1
            high = min(max(high, low + 1), len(self))
            yield low, high
            low = high


class TokenFile:
    """Writes a table to an open file, batch by batch; only the lengths stay in memory."""

    def __init__(
        self,
        file: BinaryIO,
        dtype: np.dtype[np.unsignedinteger],
        lengths: NDArray[np.integer] | None = None,
    ) -> None:
        """`file` is open for reading and writing, at its end, and is closed with the table;
        `lengths`: of the rows that it holds already."""
        self._file = file
        self._close = weakref.finalize(self, _close, file)
        self._dtype = dtype
        self._lengths = [np.zeros(0, np.int32) if lengths is None else lengths.astype(np.int32)]

    def append(self, flat: Ids, lengths: NDArray[np.int64]) -> None:
        """The next rows. Raises OSError where the disk is full."""
        self._file.write(pad_rows(flat, lengths, self._dtype).data)
        self._lengths.append(lengths.astype(np.int32))

    def finish(self) -> TokenTable:
        """Everything appended, the ids mapped from the file."""
        self._file.flush()
        lengths = np.concatenate(self._lengths).astype(np.int64)
        if not lengths.any():  # nothing can be mapped
            return TokenTable.of(np.zeros(0, self._dtype), lengths)
        table = TokenTable.of(np.memmap(self._file, self._dtype, "r"), lengths, self._file)
        self._close.detach()
        weakref.finalize(table, _close, self._file)
        return table


def _close(file: BinaryIO) -> None:
    """A full disk that already failed the job may fail what is left to flush as well."""
    with suppress(OSError):
        file.close()


def pad_rows(flat: Ids, lengths: NDArray[np.int64], dtype: np.dtype[np.unsignedinteger]) -> Ids:
    """Rows that lie end to end in `flat`, moved to word borders: [slots] of `dtype`."""
    widths = _padded(lengths, dtype)
    padded = np.zeros(int(widths.sum()), dtype)
    shift = np.cumsum(widths - lengths) - (widths - lengths)
    padded[np.arange(len(flat)) + np.repeat(shift, lengths)] = flat
    return padded


def _padded(lengths: NDArray[np.int64], dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.int64]:
    slots = WORD_BYTES // dtype.itemsize
    padded: NDArray[np.int64] = -(-lengths // slots) * slots
    return padded
