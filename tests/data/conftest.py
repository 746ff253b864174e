"""Makes the scripts of data/ importable, and holds the paths of what they made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))  # they are run as files, so they import each other by bare names


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return DATA


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return DATA / "demo_model"
