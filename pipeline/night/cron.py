"""Cron expressions: which days and times they mean, and the same in systemd's words.

Five fields, as Debian's cron and cronie understand both: numbers, names, `*`, lists, ranges, steps.
Where day of month and day of week are both restricted, either is enough; a field that begins with
`*` does not restrict. Knows nothing about time zones: all times are those on the wall.
"""

from __future__ import annotations

import calendar
import datetime
import re
from dataclasses import dataclass

from pipeline.errors import UsageError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAYS_BACK = 14_700  # from a 29th of February on a Sunday to the next, over 2100: 40 years
_ITEM = re.compile(r"(\*|[a-z0-9]+(?:-[a-z0-9]+)?)(?:/(\d+))?")


@dataclass(frozen=True)
class _Field:
    """One of the five: its name, smallest and largest value, and words for values from `low` on."""

    name: str
    low: int
    high: int
    words: tuple[str, ...] = ()

    def parse(self, text: str) -> frozenset[int]:
        """Raises ValueError with what is wrong."""
        return frozenset(value for item in text.lower().split(",") for value in self._item(item))

    def _item(self, item: str) -> range:
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"{item!r} is no {self.name}")
        span, step = match[1], match[2]
        if step is not None and (int(step) == 0 or not ("-" in span or span == "*")):
            raise ValueError(f"{item!r} needs a range and a step above 0, like */15 or 10-50/15")
        if span == "*":
            first, last = self.low, self.high
        else:
            ends = [self._value(text) for text in span.split("-")]
            first, last = ends[0], ends[-1]
        if first > last:
            raise ValueError(f"{item!r} ends before it begins")
        return range(first, last + 1, int(step or 1))

    def _value(self, text: str) -> int:
        if text in self.words:
            return self.low + self.words.index(text)
        if not text.isdigit() or not self.low <= int(text) <= self.high:
            raise ValueError(f"{text!r} is no {self.name} ({self.low}-{self.high})")
        return int(text)


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 7, _WEEKDAYS),
)
# Names that cron's own manual gives to some expressions.
_NAMED = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}  # fmt: skip


@dataclass(frozen=True)
class Cron:
    """`weekdays` count from Sunday = 0; `is_either`: day of month or of week is enough."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    is_either: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Raises UsageError naming the field, also for an expression that never comes true."""
        fields = _NAMED.get(text.strip().lower(), text).split()
        try:
            if len(fields) != len(_FIELDS):
                raise ValueError(f"it has {len(fields)} fields, not 5")
            minutes, hours, days, months, weekdays = (
                field.parse(part) for field, part in zip(_FIELDS, fields, strict=True)
            )
        except ValueError as error:
            raise UsageError(
                f"cannot read the cron expression {text!r}: {error}; write it like '0 2 * * *' or "
                "@daily"
            ) from None
        is_either = not (fields[2].startswith("*") or fields[4].startswith("*"))
        week = frozenset(day % 7 for day in weekdays)
        cron = cls(" ".join(fields), minutes, hours, days, months, week, is_either)
        if not is_either and all(min(days) > _longest(month) for month in months):
            raise UsageError(f"the cron expression {text!r} never comes true; check the days")
        return cron

    def falls_on(self, day: datetime.date) -> bool:
        """Whether there is a start on this day."""
        is_day, is_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        is_fitting = is_day or is_weekday if self.is_either else is_day and is_weekday
        return day.month in self.months and is_fitting

    def last_day(self, wall: datetime.datetime) -> datetime.date:
        """The date of the last start at or before this time on the wall."""
        time = (wall.hour, wall.minute)
        is_begun = any((hour, minute) <= time for hour in self.hours for minute in self.minutes)
        for ago in range(0 if is_begun else 1, _DAYS_BACK):
            day = wall.date() - datetime.timedelta(days=ago)
            if self.falls_on(day):
                return day
        raise AssertionError(f"{self.text} has no start in {_DAYS_BACK} days")

    def on_calendar(self, timezone: str) -> list[str]:
        """The same for systemd: one value of `OnCalendar=`, or two, either of which is enough."""
        weekdays = "" if len(self.weekdays) == 7 else _names(self.weekdays) + " "
        months = _numbers(self.months, _FIELDS[3])
        days = _numbers(self.days, _FIELDS[2])
        hours, minutes = _numbers(self.hours, _FIELDS[1]), _numbers(self.minutes, _FIELDS[0])
        time = f"{hours}:{minutes}:00 {timezone}"
        if self.is_either:
            return [f"*-{months}-{days} {time}", f"{weekdays}*-{months}-* {time}"]
        return [f"{weekdays}*-{months}-{days} {time}"]


def _longest(month: int) -> int:
    return calendar.monthrange(2000, month)[1]


def _names(weekdays: frozenset[int]) -> str:
    return ",".join(_WEEKDAYS[day % 7].capitalize() for day in range(1, 8) if day % 7 in weekdays)


def _numbers(values: frozenset[int], field: _Field) -> str:
    """`*`, or ascending values with runs of three and more as first..last."""
    if len(values) == field.high - field.low + 1:
        return "*"
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts: list[str] = []
    for run in runs:
        is_long = len(run) > 2
        texts += [f"{run[0]:02}..{run[-1]:02}"] if is_long else [f"{value:02}" for value in run]
    return ",".join(texts)
