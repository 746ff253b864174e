"""Audits whose baseline is slow."""

from __future__ import annotations

import pytest

from pipeline.audit import other_arms


@pytest.fixture
def few_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is planted in 4 rows instead of 8: for each, a row is computed again from its start."""
    monkeypatch.setattr(other_arms, "_FAULT_ROWS", 2)
