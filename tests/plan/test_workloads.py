"""T and U of real prompts against a trie made node by node; skipped where they do not lie by."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.unique_tokens import WORKLOADS, count


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.parquet")), ids=lambda path: path.stem)
def test_unique_tokens_of_a_workload(path: Path) -> None:
    """Seen red: one prompt of the plan left out."""
    counted = count(path)
    assert counted.planned == counted.oracle
