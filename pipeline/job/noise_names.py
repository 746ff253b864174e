"""What a sampled row's noise is drawn by: its id, or without ids its place and its prompt.

A made id holds the name of a file; another name of the same file shall not give other answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from pipeline.inputs.columns import ColumnMap
from pipeline.plan.plan import Names
from pipeline.plan.token_table import TokenTable


def noise_names(columns: ColumnMap, ids: Names, table: TokenTable) -> Names:
    """By row, for `build_plan`."""
    return ids if columns.id is not None else _Unnamed(table)


def noise_name(columns: ColumnMap, row_id: str, row: int, prompt: ArrayLike) -> str:
    """Of one row of the input, whose prompt has these token ids."""
    return row_id if columns.id is not None else _unnamed(row, prompt)


class _Unnamed(Sequence[str]):
    """Made when asked for: only sampled rows need them."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return _unnamed(row, self._table[row])


def _unnamed(row: int, prompt: ArrayLike) -> str:
    content = hashlib.blake2b(np.asarray(prompt, "<u4").tobytes(), digest_size=16)
    return f"{row}\x1f{content.hexdigest()}"
