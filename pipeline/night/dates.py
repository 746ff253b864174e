"""On which date a night is: that of its start in the job's time zone. Knows nothing about files."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

from pipeline.errors import UsageError
from pipeline.night.cron import Cron

_YEARS = range(1970, 9999)


def logical_date(scheduled: datetime.datetime, timezone: str) -> datetime.date:
    """The date of an aware `scheduled` start in the job's zone. Raises UsageError."""
    if scheduled.tzinfo is None:
        raise UsageError("a start without a zone is on no date; give the time with its offset")
    return scheduled.astimezone(open_zone(timezone)).date()


def choose_date(date: str | None, cron: str | None, timezone: str | None) -> datetime.date:
    """The date that a command was given, or that of what begins now. Raises UsageError."""
    if date is not None and cron is not None:
        raise UsageError("--date and --cron both say which night it is; leave one out")
    if date is not None:
        return parse_date(date)
    planned = None if cron is None else Cron.parse(cron)
    return date_of_sitting(datetime.datetime.now(datetime.UTC), timezone, planned)


def parse_date(text: str) -> datetime.date:
    """Raises UsageError unless it looks like 2026-11-22, and nights can be counted around it."""
    try:
        day = datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise UsageError(f"{text!r} is not a date; write it like 2026-11-22") from None
    if day.year not in _YEARS:
        raise UsageError(
            f"{text} is no date of a night: it must lie in the years {_YEARS[0]} to {_YEARS[-1]}"
        )
    return day


def date_of_sitting(
    now: datetime.datetime, timezone: str | None = None, cron: Cron | None = None
) -> datetime.date:
    """The logical date of what begins `now` (aware): that of the last start by `cron`, or today.

    `timezone` None: the machine's own. Goes by the time on the wall, so a start that summer time
    skipped, and that cron makes up for an hour later, is on its own day.
    """
    wall = now.astimezone(None if timezone is None else open_zone(timezone))
    return wall.date() if cron is None else cron.last_day(wall)


def open_zone(name: str) -> ZoneInfo:
    """Raises UsageError if there is no such time zone."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise UsageError(
            f"there is no time zone {name!r}; write it like Europe/Berlin or UTC"
        ) from None


def made_up_starts(
    cron: Cron, timezone: str, first: datetime.date, days: int
) -> list[datetime.datetime]:
    """Times on the wall, in order, of starts that summer time skips: as much later as it skips.

    Cron and Prefect make up for them by themselves, systemd does not. Raises UsageError.
    """
    zone, found = open_zone(timezone), set()
    for day in (first + datetime.timedelta(days=ahead) for ahead in range(days)):
        noon = datetime.datetime.combine(day, datetime.time(12), zone)
        is_short = noon.utcoffset() != (noon - datetime.timedelta(days=1)).utcoffset()
        if is_short and cron.falls_on(day):
            walls = [noon.replace(hour=h, minute=m) for h in cron.hours for m in cron.minutes]
            real = [wall.astimezone(datetime.UTC).astimezone(zone) for wall in walls]
            found |= {r for r, wall in zip(real, walls, strict=True) if _shown(r) != _shown(wall)}
            found -= set(walls)
    return sorted(found)


def _shown(time: datetime.datetime) -> tuple[int, int]:
    return time.hour, time.minute
