"""The folder for what a benchmark makes and nobody commits: models, environments, jobs, logs."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "COPPICE_BENCH"


def scratch(name: str) -> Path:
    """`.bench/<name>` in the repository, or below $COPPICE_BENCH; git sees nothing in it."""
    folder = Path(os.environ.get(VARIABLE) or ROOT / ".bench").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder / name
