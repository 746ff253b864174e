"""The table of faults is complete and is what the tests say."""

from __future__ import annotations

from tests import faults


def test_every_case_has_a_test_or_is_known_to_lack_one() -> None:
    """Seen red: with the marker of a case removed."""
    tested = {fault.case for fault in faults.faults()}
    assert tested | faults.PENDING.keys() == set(faults.CASES)
    assert not tested & faults.PENDING.keys()


def test_the_page_is_what_the_tests_say() -> None:
    """`make faults` brings it up to date."""
    assert (faults.ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == faults.page()


def test_every_line_says_something() -> None:
    assert all(f.injected and f.outcome and "|" not in f.outcome for f in faults.faults())
