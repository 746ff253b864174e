"""The best order of fields by trying all, and tables small enough for it."""

from functools import cache
from itertools import combinations

import numpy as np

from pipeline.plan.field_order import FieldTable

Rows = tuple[tuple[int, ...], ...]
Costs = list[list[int]]


def most_by_enumeration(rows: Rows, costs: Costs) -> int:
    """What the rows share in the best of all (fields!)^rows orders.

    A tree over the rows' fields begins with some value of the first row; all rows that could begin
    with it as well do, or do not, in every combination.
    """

    @cache
    def best(left: frozenset[int], fields: frozenset[int]) -> int:
        if len(left) < 2 or not fields:
            return 0
        first, *others = sorted(left)
        most = 0
        for field in fields:
            value = rows[first][field]
            mates = [row for row in others if rows[row][field] == value]
            for size in range(len(mates) + 1):
                for chosen in combinations(mates, size):
                    group = frozenset((first, *chosen))
                    below = best(group, fields - {field}) + best(left - group, fields)
                    most = max(most, size * costs[field][value] + below)
        return most

    return best(frozenset(range(len(rows))), frozenset(range(len(rows[0]))))


def shared_by_trie(rows: Rows, costs: Costs, order: list[list[int]]) -> int:
    """What these orders share, by a set of all beginnings."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    saved = 0
    for row, fields in zip(rows, order, strict=True):
        beginning: tuple[tuple[int, int], ...] = ()
        for field in fields:
            beginning += ((field, row[field]),)
            saved += costs[field][row[field]] if beginning in seen else 0
            seen.add(beginning)
    return saved


def to_table(rows: Rows, costs: Costs) -> FieldTable:
    """The same rows as the planner takes them."""
    codes = np.array(rows, np.int32).T
    return FieldTable(tuple(codes), tuple(np.array(cost, np.int64) for cost in costs))


def random_table(random: np.random.Generator) -> tuple[Rows, Costs]:
    """3 to 7 rows of 2 to 4 fields: even or skewed values, fields that follow from another."""
    num_rows, num_fields = random.integers(3, 8), random.integers(2, 5)
    kinds = random.choice([1, 2, 2, 3, 3, int(num_rows)], num_fields)
    skew = random.choice([0.0, 1.2])
    values = random.integers(0, 100, (num_rows, num_fields)) % kinds
    if skew:
        values = np.minimum(random.exponential(1 / skew, values.shape).astype(int), kinds - 1)
    if num_fields > 2 and random.random() < 0.4:
        values[:, 1] = random.integers(0, 3, 8)[values[:, 0]]
    per_value = random.choice([1, 2, 5, 20, 100], (num_fields, 8))
    per_field = np.repeat(random.choice([1, 3, 10, 50], (num_fields, 1)), 8, axis=1)
    costs = np.where(random.random((num_fields, 1)) < 0.5, per_value, per_field)
    return tuple(map(tuple, values.tolist())), costs.tolist()
