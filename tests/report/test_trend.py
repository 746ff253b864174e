"""Nights as numbers: what their files say and no more, however damaged they are."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.sparks import draw_trend
from pipeline.report.trend import Night, night_before, read_trend
from pipeline.storage.nights import NightFiles
from tests.report.run_sample import COUNTERS

WHOLE = {"status": "complete", "counters": COUNTERS}


def night(manifest: Any, audit: Any = None, is_abandoned: bool = False, day: int = 1) -> NightFiles:
    return NightFiles(f"2026-11-{day:02d}", manifest, audit, True, is_abandoned)


def only(files: NightFiles) -> Night:
    return read_trend([files, files])[0]


def test_a_night_has_the_numbers_of_its_run() -> None:
    found = only(night(WHOLE, {"verdict": "pass"}))
    assert (found.state, found.rows_ok, found.rows_failed) == ("complete", 1200, 3)
    assert (found.wall_s, found.verdict) == (92.4, "pass")
    assert found.saved_share == pytest.approx(313_580 / 412_345)
    assert found.tokens_per_s == pytest.approx(45_678 / 92.4)
    assert found.page == "../2026-11-01/report.html"


@pytest.mark.parametrize(
    ("manifest", "is_abandoned", "state"),
    [
        (None, False, "damaged"),
        ({}, False, "damaged"),
        ({"status": ["<b>"]}, False, "damaged"),
        ({"status": "running"}, False, "running"),
        ({"status": "running"}, True, "interrupted"),
        ({"status": "stopped"}, True, "stopped"),
        ({"status": "failed"}, True, "failed"),
    ],
)
def test_a_night_that_is_not_whole_says_what_it_is(
    manifest: Any, is_abandoned: bool, state: str
) -> None:
    found = only(night(manifest, None, is_abandoned))
    assert (found.state, found.rows_ok, found.verdict) == (state, None, None)


@pytest.mark.parametrize(
    "value",
    ["1200", None, True, [1], {}, float("nan"), float("inf"), -1, 10**400],
    ids=lambda value: repr(value)[:8],
)
def test_a_number_that_is_none_is_not_shown(value: Any) -> None:
    """Seen red: 10**400, which is an int to JSON and no float."""
    counters = dict.fromkeys(COUNTERS, value)
    found = only(night({"status": "complete", "counters": counters}, [value]))
    numbers = (found.rows_ok, found.wall_s, found.saved_share, found.tokens_per_s, found.verdict)
    assert numbers == (None,) * 5


def test_nights_with_conversations_tell_how_these_fared() -> None:
    health = {"rows_degenerate": 12, "rows_evicting": 300, "rows_skewed": 0}
    ill = WHOLE | {"counters": COUNTERS | health | {"rows_degenerate": 60}}
    well = WHOLE | {"counters": COUNTERS | health}
    first, second, _ = nights = read_trend([night(well), night(ill, day=2), night(WHOLE, day=3)])
    assert (first.degenerate_share, first.evicting_share, first.skewed) == (0.01, 0.25, 0)
    assert second.degenerate_share == 0.05 and nights[2].degenerate_share is None
    sparks = {s.name: s for s in draw_trend(nights[:2])}
    assert sparks["turns that repeat themselves"].value == "5.0 %"
    assert sparks["turns that gave up tokens"].value == "25.0 %"
    assert not any("turns" in s.name for s in draw_trend(read_trend([night(WHOLE)] * 2)))


def test_the_night_before_is_one_that_has_numbers() -> None:
    days = [night(WHOLE, day=1), night(None, day=2), night(WHOLE, day=3)]
    before = night_before(read_trend(days))
    assert before is not None and before.date == "2026-11-01"
    assert night_before(read_trend(days[1:])) is None
    assert read_trend(days[:1]) == () and night_before(()) is None


def test_a_bar_is_as_high_as_its_number() -> None:
    """Seen red: with bars that begin at half of the largest number."""
    half = WHOLE | {"counters": COUNTERS | {"wall_s": 46.2, "rows_error": 0}}
    sparks = {s.name: s for s in draw_trend(read_trend([night(WHOLE), night(half, day=2)]))}
    assert sparks["wall time"].svg.count('height="100"') == 1
    assert sparks["wall time"].svg.count('height="50"') == 1
    assert (sparks["wall time"].value, sparks["wall time"].against) == ("46.2 s", "−50 %")
    assert 'class="zero"' in sparks["rows failed"].svg
    assert sparks["audit"].value == "–" and draw_trend(()) == []
