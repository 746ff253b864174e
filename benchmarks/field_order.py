"""How good and how fast the order of fields is: `python -m benchmarks.field_order`.

Prints what the order found shares over the best of all orders, on random tables small enough to
try all, for our score and for that of arXiv 2403.05821 (what a value saves); then seconds and
memory on large tables of ten fields, from three values each to one for every row.
"""

from __future__ import annotations

import argparse
import resource
import time
from unittest import mock

import numpy as np

from pipeline.plan import field_order
from pipeline.plan.field_order import FieldTable, best_order, given_order
from tests.plan.field_oracle import most_by_enumeration, random_table, to_table

_KINDS = (3, 20, 200, 2000, 0.2, 0.3, 1.0, 1.0, 50, 0.1)  # values; below 2, a share of the rows


def _ratios(tables: int) -> np.ndarray:
    random = np.random.default_rng(0)
    ratios: list[float] = []
    while len(ratios) < tables:
        rows, costs = random_table(random)
        most, table = most_by_enumeration(rows, costs), to_table(rows, costs)
        if most:
            ratios.append(table.shared(best_order(table)) / most)
    return np.array(ratios)


def _print_ratios(name: str, ratios: np.ndarray) -> None:
    print(
        f"{name:24} mean {ratios.mean():.4f} of the optimum, worst {ratios.min():.3f}, "
        f"below 0.95: {(ratios < 0.95).mean():.2%} of {len(ratios)} tables"
    )


def _large_table(num_rows: int) -> FieldTable:
    random = np.random.default_rng(0)
    kinds = [int(k if k >= 2 else k * num_rows) for k in _KINDS]
    codes = [
        random.zipf(1.3, num_rows) % kind if place % 2 else random.integers(0, kind, num_rows)
        for place, kind in enumerate(kinds)
    ]
    codes[3] = codes[4] % kinds[3]  # follows from another field
    return FieldTable(
        tuple(code.astype(np.int32) for code in codes),
        tuple(random.integers(5, 200, kind) for kind in kinds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    _print_ratios("ours", _ratios(args.tables))
    with mock.patch.object(field_order, "_MOST_TRIES", 1):
        _print_ratios("ours, one try", _ratios(args.tables))
        nothing = mock.patch.object(field_order._Candidates, "_losses", lambda self: 0.0)
        with nothing:
            _print_ratios("the paper's score", _ratios(args.tables))
    for num_rows in args.rows:
        table = _large_table(num_rows)
        started = time.perf_counter()
        order = best_order(table)
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        shared = [table.shared(some) / table.total() for some in (given_order(table), order)]
        print(
            f"{num_rows:9,} rows x {table.num_fields} fields: {seconds:5.1f} s, "
            f"peak {memory:.2f} GiB, shared {shared[0]:.1%} as given, {shared[1]:.1%} found"
        )


if __name__ == "__main__":
    main()
