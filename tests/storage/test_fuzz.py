"""Damaged files by the hundred: rows or a named refusal, never a crash, a hang or all of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage import fuzz


def check(counts: fuzz.Counts, files: int) -> None:
    """Every file ended in one of the two ways, and both occur: the damage is some and not all."""
    print(counts)
    assert counts.surprises == []
    assert counts.outcomes["read"] + counts.outcomes["InputError"] == files
    assert counts.outcomes["read"] > files // 100 and counts.outcomes["InputError"] > files // 2


def test_what_is_damaged_was_whole(tmp_path: Path) -> None:
    for content in fuzz.valid_files():
        (tmp_path / "whole.parquet").write_bytes(content)
        assert fuzz._read_file(tmp_path / "whole.parquet") == ("read", 500, "")
    assert [*fuzz.damaged_files(7, 20)] == [*fuzz.damaged_files(7, 20)]


@pytest.mark.fault(
    "fuzzed Parquet",
    injected="300 files (make fuzz: 20,000): flips, cuts, splices, lengths, swapped pages",
    outcome="rows or InputError; no crash, no hang, memory bounded",
)
def test_a_few_hundred_damaged_files() -> None:
    """Seen red: with `pa.ArrowException` missing in `damage_named`."""
    check(fuzz.read_damaged(seed=0, count=300), 300)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_damaged_files() -> None:
    check(fuzz.read_damaged(seed=1, count=5000), 5000)


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crash, exit status -11"),
        ("import time; time.sleep(60)", "hang, exit status -9"),
        ("bytearray(4 << 30)", "MemoryError: "),
    ],
)
def test_a_crash_a_hang_and_too_much_memory_are_found(
    monkeypatch: pytest.MonkeyPatch, fault: str, end: str
) -> None:
    """The third of five files does what must not happen; the others are read all the same."""
    monkeypatch.setenv("COPPICE_FUZZ_FAULT", fault)
    counts = fuzz.read_damaged(seed=0, count=5, most_seconds=3.0)
    assert counts.surprises == [(2, end)]
    assert sum(counts.outcomes.values()) == 5
