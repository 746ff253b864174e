"""Row groups that were decoded lately, up to a number of bytes. Knows no files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pyarrow as pa


class GroupCache:
    """Decoded row groups, the least recently used dropped first; always room for one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def get(self, group: int, read: Callable[[], pa.Table]) -> pa.Table:
        """The row group, from `read` if it is not here."""
        table = self._tables.pop(group, None)
        if table is None:
            table = read()
        self._tables[group] = table
        while len(self._tables) > 1 and self.num_bytes > self._max_bytes:
            self._tables.popitem(last=False)
        return table

    @property
    def num_bytes(self) -> int:
        """Of all tables that are kept."""
        return sum(table.nbytes for table in self._tables.values())
