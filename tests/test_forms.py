"""How sizes, durations and shares are written: one grammar, and what is outside of it."""

from __future__ import annotations

import pytest

from pipeline.forms import (
    parse_duration,
    parse_row_limit,
    parse_share,
    parse_size,
    write_duration,
    write_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5k", 1500), (1024, 1024),
        (" 2 mib ", 2 << 20), ("1TiB", 1 << 40), ("8GB", 8 * 10**9), ("8Gi", 8 << 30),
    ],
)  # fmt: skip
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4h", 14400.0), ("90m", 5400.0), ("30", 30.0), (2.5, 2.5), ("1d", 86400.0),
        ("4h30m", 16200.0), ("90s", 90.0), ("1H 5m", 3900.0), (".5h", 1800.0),
    ],
)  # fmt: skip
def test_durations(text: str | float, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("5%", 0.05), ("0.05", 0.05), (1, 1.0), ("0", 0)])
def test_shares(text: str | float, expected: float) -> None:
    assert parse_share(text) == expected


@pytest.mark.parametrize("text", ["", "8 apples", "-1", "GiB", ".", "1.2.3", "4h30", "h", "1e400"])
def test_what_is_outside_of_the_grammar_is_refused(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_share, parse_row_limit):
        with pytest.raises(ValueError, match="like"):
            parse(text)


@pytest.mark.parametrize("text", ["101%", "1.5", "50", True, None])
def test_a_share_lies_between_nothing_and_all(text: object) -> None:
    with pytest.raises(ValueError, match="write it like 5% or 0.05"):
        parse_share(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1000, 1536, 8 << 30, 1 << 40, 3 << 20])
def test_a_size_is_written_as_it_is_read(count: int) -> None:
    assert parse_size(write_size(count)) == count


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0"), (1800, "30m"), (16200, "4h30m"), (90, "1m30s")]
)
def test_a_duration_is_written_as_it_is_read(seconds: float, text: str) -> None:
    assert write_duration(seconds) == text and parse_duration(text) == seconds
