"""The order of each row's fields in which rows share most. Knows codes and lengths, no text.

Rows share a field's tokens only where all fields before it agree as well, so what comes first
decides what the rest can share. As in "Optimizing LLM Queries in Relational Data Analytics
Workloads" (arXiv 2403.05821) rows are put into groups that begin with one value of one field, and
the same is done within each group for the fields that are left:

```
 rows of a group ─► fields on which all agree, next ─► the best values of other fields ─► new groups
```

The paper takes the value that saves most. That may tear rows apart which share more in their other
fields, so a value is taken here for what it saves by what its choice makes impossible. All groups
take a step together, and in one step every value that is the best of most of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MOST_TRIES = 64
_CELLS_TO_TRY = 1_000_000
_SPREAD = 2.0  # of the logarithm of a score that is shaken
_ENOUGH = 0.75  # of a value's rows that have no better one; all: four times the steps, no gain


@dataclass(frozen=True, eq=False)
class FieldTable:
    """Rows by their fields' values. `codes`: [fields][rows] int32, equal where values are equal.

    `lengths`: [fields][codes of the field] int64, what each value costs, in any one unit.
    """

    codes: tuple[NDArray[np.int32], ...]
    lengths: tuple[Ints, ...]

    @property
    def num_rows(self) -> int:
        return len(self.codes[0])

    @property
    def num_fields(self) -> int:
        """How many fields each row has; never 0."""
        return len(self.codes)

    def total(self) -> int:
        return sum(int(cost[code].sum()) for code, cost in self.fields())

    def most_shared(self) -> int:
        """What no order can exceed: every value is computed at least once."""
        once = sum(int(cost[np.unique(code)].sum()) for code, cost in self.fields())
        return self.total() - once

    def fields(self) -> Iterator[tuple[NDArray[np.int32], Ints]]:
        """Codes and lengths, field by field."""
        return zip(self.codes, self.lengths, strict=True)

    def shared(self, order: NDArray[np.uint8]) -> int:
        """What rows share with others if row i lists the fields `order[i]`: [rows, fields]."""
        saved = 0
        node = np.zeros(self.num_rows, np.int64)
        rows = np.arange(self.num_rows)
        most_codes = max(map(len, self.lengths))
        for field in order.T:
            code, cost = self._gather(field, rows)
            key = (node * self.num_fields + field) * most_codes + code
            _, first, node = np.unique(key, return_index=True, return_inverse=True)
            saved += int(cost.sum() - cost[first].sum())
        return saved

    def _gather(self, field: NDArray[np.uint8], rows: Ints) -> tuple[Ints, Ints]:
        """Code and length of the field `field[i]` of row i."""
        code, cost = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for f in range(self.num_fields):
            here = field == f
            code[here] = self.codes[f][rows[here]]
            cost[here] = self.lengths[f][code[here]]
        return code, cost


def given_order(table: FieldTable) -> NDArray[np.uint8]:
    """All rows in the order of the table's fields: [rows, fields]."""
    return np.tile(np.arange(table.num_fields, dtype=np.uint8), (table.num_rows, 1))


def best_order(table: FieldTable) -> NDArray[np.uint8]:
    """For each row the order of its fields, [rows, fields], never worse than `given_order`.

    Time grows with rows x fields^2. Small tables are tried several times with scores that are
    shaken, always in the same way: a table has one order.
    """
    cells = table.num_rows * table.num_fields
    num_tries = int(np.clip(_CELLS_TO_TRY // cells, 1, _MOST_TRIES))
    orders = [_Grouping(table, seed).run() for seed in range(num_tries)]
    return max([*orders, given_order(table)], key=table.shared)


def best_fixed_order(table: FieldTable, order: NDArray[np.uint8]) -> list[int]:
    """The best order found that is the same for all rows, for a person to write down.

    Tried are the given one, the fields by their mean place in `order` (of `best_order`), and by
    how much of each could be shared at all.
    """
    ranks = np.argsort(order, axis=1).mean(axis=0)
    alone = [
        FieldTable((code,), (cost,)).most_shared() / max(1, int(cost[code].sum()))
        for code, cost in table.fields()
    ]
    tried = [
        list(range(table.num_fields)),
        np.argsort(ranks, kind="stable").tolist(),
        np.argsort(np.negative(alone), kind="stable").tolist(),
    ]

    def shared(fields: list[int]) -> int:
        return table.shared(np.tile(np.array(fields, np.uint8), (table.num_rows, 1)))

    return max(tried, key=shared)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Values that some, not all, rows of a group have in a field, over all groups and fields.

    `of_row`: [fields, active rows] the candidate, -1 where none; `field`, `count` (rows that have
    it) and `cost` (its length): [candidates] int64.
    """

    of_row: NDArray[np.int32]
    field: Ints
    count: Ints
    cost: Ints

    def __len__(self) -> int:
        return len(self.count)

    def best_of_rows(self, shake: NDArray[np.float64]) -> Ints:
        """[active rows] the best candidate of each row, -1 where it has none.

        The score is what a value saves by what its choice makes impossible to share, times
        `shake`: [candidates]; equal ones are taken by field and value.
        """
        score = shake * (self.count - 1) * self.cost / (self._losses() + 1e-6)
        by_score = np.lexsort((np.arange(len(self)), -score))
        rank = np.full(len(self) + 1, len(self))  # the last one is that of candidate -1
        rank[by_score] = np.arange(len(self))
        best: Ints = np.append(by_score, -1)[rank[self.of_row].min(axis=0)]
        return best

    def _losses(self) -> Ints:
        """[candidates] the length of all values of other fields that occur both in its rows and in
        other rows of its group: they are computed once more if this candidate is chosen."""
        lost = np.zeros(len(self), np.int64)
        for one, other, together in self._meetings():
            np.add.at(lost, one, np.where(together < self.count[other], self.cost[other], 0))
            np.add.at(lost, other, np.where(together < self.count[one], self.cost[one], 0))
        return lost

    def _meetings(self) -> Iterator[tuple[Ints, Ints, Ints]]:
        """For each two fields: pairs of candidates, and how many rows have both."""
        for left, right in combinations(self.of_row, 2):
            both = (left >= 0) & (right >= 0)
            if both.any():
                rows = pl.DataFrame({"one": left[both], "other": right[both]})
                met = rows.group_by("one", "other").len().cast(pl.Int64)
                yield met["one"].to_numpy(), met["other"].to_numpy(), met["len"].to_numpy()


class _Grouping:
    """Rows on their way into groups. `_rows[i]` is the i-th active row, `_group[i]` its group."""

    def __init__(self, table: FieldTable, seed: int) -> None:
        """`seed` 0 takes the scores as they are."""
        self._table = table
        self._spread = _SPREAD if seed else 0.0
        self._random = np.random.default_rng(seed)
        self._rows = np.arange(table.num_rows)
        self._group = np.zeros(table.num_rows, np.int64)
        self._order = np.zeros((table.num_rows, table.num_fields), np.uint8)
        self._is_placed = np.zeros((table.num_rows, table.num_fields), bool)

    def run(self) -> NDArray[np.uint8]:
        """[rows, fields] the order; fields in which a row has no companion left come as given."""
        while len(self._rows):
            self._split(self._find_candidates())
        for field in range(self._table.num_fields):
            self._place(np.flatnonzero(~self._is_placed[:, field]), field)
        return self._order

    def _place(self, rows: Ints, field: int) -> None:
        self._order[rows, self._is_placed[rows].sum(axis=1)] = field
        self._is_placed[rows, field] = True

    def _find_candidates(self) -> _Candidates:
        """And place the fields on which whole groups agree: they cost nothing.

        These are the paper's functional dependencies, all that hold within a group.
        """
        size = np.bincount(self._group)
        of_row = np.full((self._table.num_fields, len(self._rows)), -1, np.int32)
        fields, counts, costs = [], [], []
        num_found = 0
        for field, (code_of, lengths) in enumerate(self._table.fields()):
            here = np.flatnonzero(~self._is_placed[self._rows, field])
            code, group = code_of[self._rows[here]], self._group[here]
            _, first, value, count = np.unique(
                group * len(lengths) + code,
                return_index=True, return_inverse=True, return_counts=True,
            )  # fmt: skip
            is_agreed = count == size[group[first]]
            self._place(self._rows[here[is_agreed[value]]], field)
            is_shared = (count > 1) & ~is_agreed
            number = np.where(is_shared, num_found + np.cumsum(is_shared) - 1, -1)
            of_row[field, here] = number[value]
            num_found += int(is_shared.sum())
            fields.append(np.full(int(is_shared.sum()), field))
            counts.append(count[is_shared])
            costs.append(lengths[code[first[is_shared]]])
        return _Candidates(of_row, *map(np.concatenate, (fields, counts, costs)))

    def _split(self, candidates: _Candidates) -> None:
        """Groups for the values that are the best of their rows; rows without any are done."""
        shake = np.exp(self._spread * self._random.standard_normal(len(candidates)))
        best = candidates.best_of_rows(shake)
        chosen_by = np.bincount(best + 1, minlength=len(candidates) + 1)[1:]
        is_taken = (chosen_by > 1) & (chosen_by >= _ENOUGH * candidates.count)
        is_taken = np.append(is_taken, False)[best]
        for field in range(self._table.num_fields):
            here = is_taken & (np.append(candidates.field, -1)[best] == field)
            self._place(self._rows[here], field)
        group = np.where(is_taken, self._group.max() + 1 + best, self._group)
        goes_on = best >= 0
        self._rows = self._rows[goes_on]
        self._group = np.unique(group[goes_on], return_inverse=True)[1]
