"""What is told where a folder holds another run."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.storage.manifest import check_fingerprint


@pytest.mark.parametrize(
    ("value", "said"),
    [("a" * 64, '"' + "a" * 29 + '…"'), ([1] * 30, "1,…]"), (None, "(null, now")],
)
def test_a_long_value_is_cut_within_its_quotes(value: Any, said: str) -> None:
    """Seen red: `("c716a208…, now "0839e24…)`, whose quotes were open."""
    with pytest.raises(RunDirectoryError) as told:
        check_fingerprint("out", {"input": value}, {"input": "b"})
    assert said in str(told.value)
