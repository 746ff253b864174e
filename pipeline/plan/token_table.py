"""Token ids of many prompts, end to end in one array. Knows nothing about text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def narrowest_dtype(vocabulary_size: int) -> np.dtype[np.unsignedinteger]:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Row i holds `flat[offsets[i] : offsets[i + 1]]`; an empty row is one that cannot run.

    `flat`: [T] uint16 or uint32; `offsets`: [rows + 1] int64, rising.
    """

    flat: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], vocabulary_size: int = 2**32) -> TokenTable:
        """For tests and small tables."""
        dtype = narrowest_dtype(vocabulary_size)
        flat = [np.asarray(row, dtype=dtype) for row in rows]
        return cls.from_batches(
            [(np.concatenate(flat), [len(r) for r in rows])] if rows else [], dtype
        )

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[tuple[NDArray[np.unsignedinteger], Sequence[int] | NDArray[np.int64]]],
        dtype: np.dtype[np.unsignedinteger],
    ) -> TokenTable:
        """Join (flat ids, row lengths) pairs, in order."""
        flats: list[NDArray[np.unsignedinteger]] = [np.zeros(0, dtype)]
        lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        for flat, length in batches:
            flats.append(flat.astype(dtype, copy=False))
            lengths.append(np.asarray(length, np.int64))
        return cls(np.concatenate(flats), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.unsignedinteger]:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] int64."""
        return np.diff(self.offsets)
