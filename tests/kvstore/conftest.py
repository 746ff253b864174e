"""Tests of the store wait for no disk."""

from __future__ import annotations

import pytest

from tests.kvstore.torture import skip_flushes


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flush is for, the power cuts play through."""
    skip_flushes(monkeypatch)
