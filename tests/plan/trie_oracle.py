"""What a plan must say, by brute force: a dictionary from every prefix to the rows that have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from pipeline.plan.token_table import TokenTable

Rows = list[tuple[int, ...]]


def count_tokens(rows: Iterable[Sequence[int]]) -> int:
    """Nodes of the trie of all rows, made one by one: U, for rows too long for `Drawn`."""
    trie: dict[int, Any] = {}
    number = 0
    for row in rows:
        node = trie
        for token in row:
            if token not in node:
                node[token] = {}
                number += 1
            node = node[token]
    return number


@dataclass(frozen=True)
class Drawn:
    """Rows of token ids (some empty, many sharing) and the tenant of each."""

    rows: Rows
    tenants: list[int]

    @property
    def table(self) -> TokenTable:
        return TokenTable.from_lists(self.rows)

    def rows_by_prefix(self) -> dict[tuple[int, tuple[int, ...]], list[int]]:
        """(tenant, prefix) -> the rows that begin with it, for every non-empty prefix."""
        found: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for row, (ids, tenant) in enumerate(zip(self.rows, self.tenants, strict=True)):
            for length in range(1, len(ids) + 1):
                found[tenant, ids[:length]].append(row)
        return dict(found)

    def reuse_depths(self) -> list[int]:
        """For each row the longest prefix that some other row of its tenant has too."""
        shared = self.rows_by_prefix()
        return [
            max((n for n in range(1, len(ids) + 1) if len(shared[tenant, ids[:n]]) > 1), default=0)
            for ids, tenant in zip(self.rows, self.tenants, strict=True)
        ]


@st.composite
def drawn_rows(draw: st.DrawFn, num_tenants: int = 2) -> Drawn:
    """A few rows over a tiny alphabet, so that prefixes, duplicates and nesting are common.

    Ids include 255, 256 and 65535: sorting must go by number, not by byte.
    """
    ids = st.lists(st.sampled_from([0, 1, 255, 256, 65535]), max_size=7)
    rows: Rows = [tuple(row) for row in draw(st.lists(ids, min_size=1, max_size=14))]
    for source in draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)):
        rows.append(rows[source])
    tenants = draw(
        st.lists(st.integers(0, num_tenants - 1), min_size=len(rows), max_size=len(rows))
    )
    return Drawn(rows, tenants)
