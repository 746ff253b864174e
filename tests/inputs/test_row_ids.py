"""Ids of rows that come twice."""

from __future__ import annotations

import polars as pl

from pipeline.inputs.row_ids import find_duplicate_ids


def test_duplicate_ids_are_named_in_order() -> None:
    assert find_duplicate_ids(pl.Series(["a", "b", "c"])) == []
    assert find_duplicate_ids(pl.Series(["b", "a", "a", "b", "c"])) == ["b", "a"]
    assert find_duplicate_ids(pl.Series([str(i // 2) for i in range(100)]), at_most=2) == ["0", "1"]
