"""How much memory a plan takes, measured in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 600_000  # 396 MB of token ids


def measure(sort_memory: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan_scale", "--here", "--rows", str(ROWS)]
    done = subprocess.run(
        [*command, "--sort-memory", sort_memory], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_memory_is_bounded_and_changes_nothing_but_itself() -> None:
    """Seen red: partitions gathered from a mapped file, whose pages stay resident."""
    little, much = measure("16MiB"), measure("1GiB")
    assert little["plan_hash"] == much["plan_hash"]
    assert little["nodes"] == much["nodes"] > ROWS
    size = 2 * little["tokens"]
    assert little["peak_rss_bytes"] < much["peak_rss_bytes"] - size // 3
