"""Which date a night is of: late starts, time zones, and days on which the clock is changed."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from pipeline.errors import UsageError
from pipeline.night.cron import Cron
from pipeline.night.dates import choose_date, date_of_sitting, logical_date, open_zone

BERLIN = ZoneInfo("Europe/Berlin")


def test_a_start_is_on_the_date_of_its_own_zone() -> None:
    scheduled = datetime(2026, 11, 21, 23, 30, tzinfo=UTC)
    assert logical_date(scheduled, "Europe/Berlin") == date(2026, 11, 22)
    assert logical_date(scheduled, "UTC") == date(2026, 11, 21)
    assert logical_date(scheduled, "America/New_York") == date(2026, 11, 21)
    with pytest.raises(UsageError, match="without a zone"):
        logical_date(datetime(2026, 11, 22, 2), "UTC")


@pytest.mark.parametrize(
    ("text", "started", "day"),
    [
        ("0 2 * * *", datetime(2026, 11, 22, 2, 0, 1), 22),
        ("0 2 * * *", datetime(2026, 11, 22, 23, 59), 22),  # twenty-two hours late
        ("0 2 * * *", datetime(2026, 11, 23, 1, 59), 22),  # and after midnight
        ("30 23 * * *", datetime(2026, 11, 23, 0, 10), 22),  # seldom late, but often past midnight
        ("0 2 * * fri", datetime(2026, 11, 23, 9, 0), 20),
    ],
)
def test_a_late_start_keeps_its_date(text: str, started: datetime, day: int) -> None:
    """Seen red: today's date whatever the expression."""
    now = started.replace(tzinfo=BERLIN).astimezone(UTC)
    assert date_of_sitting(now, "Europe/Berlin", Cron.parse(text)) == date(2026, 11, day)


@pytest.mark.fault(
    "summer time",
    injected="a night at 02:30 on the days on which 02:30 does not exist, or exists twice",
    outcome="its own date, whenever the scheduler makes up for it; the second time nothing is new",
)
@pytest.mark.parametrize(
    ("now", "day"),
    [
        (datetime(2026, 3, 29, 1, 0, 0, tzinfo=UTC), date(2026, 3, 29)),  # 03:00: cron makes up
        (datetime(2026, 3, 29, 1, 30, 0, tzinfo=UTC), date(2026, 3, 29)),  # 03:30: as Prefect says
        (datetime(2026, 3, 30, 0, 30, 0, tzinfo=UTC), date(2026, 3, 30)),
        (datetime(2026, 10, 25, 0, 30, 0, tzinfo=UTC), date(2026, 10, 25)),  # 02:30 in summer
        (datetime(2026, 10, 25, 1, 30, 0, tzinfo=UTC), date(2026, 10, 25)),  # 02:30 in winter
        (datetime(2026, 10, 25, 2, 30, 0, tzinfo=UTC), date(2026, 10, 25)),
    ],
)
def test_the_date_on_days_of_another_length(now: datetime, day: date) -> None:
    """Seen red: 02:30 turned into an instant and compared with now, which at 03:00 is too early."""
    assert date_of_sitting(now, "Europe/Berlin", Cron.parse("30 2 * * *")) == day
    assert logical_date(now, "Europe/Berlin") == day


def test_a_whole_year_of_starts_has_every_date_once() -> None:
    cron, days = Cron.parse("30 2 * * *"), []
    now = datetime(2026, 1, 1, 0, 0, tzinfo=UTC)
    while now.year == 2026:
        days.append(date_of_sitting(now + timedelta(hours=4), "Europe/Berlin", cron))
        now += timedelta(days=1)
    assert days == sorted(set(days)) and len(days) == 365


def test_a_command_that_is_told() -> None:
    assert choose_date("2026-11-22", None, None) == date(2026, 11, 22)
    assert choose_date(None, None, "UTC") in (
        datetime.now(UTC).date(), (datetime.now(UTC) - timedelta(minutes=1)).date(),
    )  # fmt: skip
    assert isinstance(choose_date(None, None, None), date)
    for wrong in ("22.11.2026", "2026-02-30", "today", "2026-11-22T02:00"):
        with pytest.raises(UsageError, match="is not a date; write it like 2026-11-22"):
            choose_date(wrong, None, None)
    for far in ("0001-01-01", "0007-01-01", "1969-12-31", "9999-12-31"):
        with pytest.raises(UsageError, match="is no date of a night: .* 1970 to 9998"):
            choose_date(far, None, None)
    with pytest.raises(UsageError, match="leave one out"):
        choose_date("2026-11-22", "0 2 * * *", None)


@pytest.mark.parametrize(
    "name", ["Europe/Berln", "europe/berlin ", "../etc/passwd", "", "/UTC", "CET/"]
)
def test_a_zone_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="there is no time zone"):
        open_zone(name)
