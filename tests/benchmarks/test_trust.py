"""What the figures of trust take from the output of other commands."""

from __future__ import annotations

from benchmarks import trust


def test_the_fuzzer_s_counts_are_read() -> None:
    """Seen red: another order of name and number, and an empty line in the table."""
    counts = trust.fuzz(60)
    assert counts["files"] == 60 == counts["read"] + counts["InputError"]
    assert counts["crash"] == counts["hang"] == counts["other"] == 0
