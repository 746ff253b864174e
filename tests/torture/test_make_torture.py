"""`make torture` from its beginning to its line of figures, with one operation a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import __main__ as make_torture


@pytest.mark.slow
def test_all_of_it_runs_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: the second model's jobs met the first one's runs of the same name."""
    monkeypatch.setattr(make_torture, "ALL", range(1))
    figures = make_torture.torture(tmp_path, kills=4, seed=0)
    said = make_torture.line(figures | {"seconds": 0})
    assert "9 operations failed, 9 killed" in said and ": 0 rows lost, 0 twice" in said
