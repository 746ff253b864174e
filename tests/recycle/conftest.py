"""Tests of the store wait for no disk: what a flush is for, the power cuts play through."""

from __future__ import annotations

import pytest

from tests.recycle.torture import skip_flushes


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_flushes(monkeypatch)
