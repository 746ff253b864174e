"""Cron expressions against cronsim, which Prefect goes by, and against systemd itself."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from itertools import islice

import pytest
from cronsim import CronSim, CronSimError
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.night.cron import Cron

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
_WORDS = {
    "month": "jan feb mar apr may jun jul aug sep oct nov dec".split(),
    "week": "sun mon tue wed thu fri sat".split(),
}


def _field(low: int, high: int, words: list[str] | None = None) -> st.SearchStrategy[str]:
    def spell(value: int) -> st.SearchStrategy[str]:
        names = [] if words is None or value - low >= len(words) else [words[value - low]]
        return st.sampled_from([str(value), f"{value:02}", *names, *(n.upper() for n in names)])

    value = st.integers(low, high).flatmap(spell)
    span = (
        st.tuples(st.integers(low, high), st.integers(low, high))
        .map(sorted)
        .map(lambda ends: f"{ends[0]}-{ends[1]}")
    )
    step = (
        st.tuples(span, st.integers(1, high))
        .filter(
            # cronsim takes a step from a range of one value for a step from there to the end
            lambda parts: len(set(parts[0].split("-"))) == 2
        )
        .map(lambda parts: f"{parts[0]}/{parts[1]}")
    )
    stars = st.sampled_from(["*", "*/2", "*/5", "*/7"])
    item = st.one_of(value, span, step)
    return st.one_of(
        st.just("*"), stars, item, st.lists(item, min_size=2, max_size=3).map(",".join)
    )


expressions = st.tuples(
    _field(0, 59), _field(0, 23), _field(1, 31), _field(1, 12, _WORDS["month"]),
    _field(0, 7, _WORDS["week"]),
).map(" ".join)  # fmt: skip
moments = st.datetimes(datetime.datetime(2024, 1, 1), datetime.datetime(2032, 1, 1)).map(
    lambda at: at.replace(microsecond=0)
)


def parse(text: str) -> Cron | None:
    """None for what never comes true, which cronsim must find as well."""
    try:
        CronSim(text, datetime.datetime(2024, 1, 1))
    except CronSimError:
        with pytest.raises(UsageError):
            Cron.parse(text)
        return None
    return Cron.parse(text)


@settings(max_examples=300, deadline=None)
@given(expressions, moments)
def test_the_last_start_is_that_of_cronsim(text: str, now: datetime.datetime) -> None:
    """Seen red: `and` in place of `or` between the two kinds of days; Sunday as 7 alone."""
    cron = parse(text)
    if cron is not None:
        before = next(CronSim(text, now + datetime.timedelta(seconds=1), reverse=True))
        assert cron.last_day(now) == before.date()


def test_the_rarest_start_of_all() -> None:
    """The 29th of February on a Sunday, from 2128 back over 2100. Seen red: eight years back."""
    cron = Cron.parse("0 2 29 2 */7")
    eve = datetime.datetime(2128, 2, 28, 12)
    assert cron.last_day(eve) == datetime.date(2088, 2, 29)
    assert cron.last_day(eve + datetime.timedelta(days=1)) == datetime.date(2128, 2, 29)


@needs_systemd
@settings(max_examples=60, deadline=None)
@given(expressions, moments)
def test_systemd_starts_when_cronsim_does(text: str, now: datetime.datetime) -> None:
    """Seen red: `*-*-DD` and weekday in one line where cron takes either."""
    cron = parse(text)
    if cron is None:
        return
    starts = sorted({at for value in cron.on_calendar("UTC") for at in systemd_starts(value, now)})
    expected = list(islice(CronSim(text, now), 4))
    assert starts[:4] == [at for at in expected if at.year < 2199]


def systemd_starts(value: str, after: datetime.datetime, count: int = 4) -> list[datetime.datetime]:
    """The next ones by `systemd-analyze calendar`, in UTC."""
    done = subprocess.run(
        ["systemd-analyze", "calendar", f"--iterations={count}", f"--base-time={after} UTC", value],
        capture_output=True, text=True, env={"TZ": "UTC", "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, f"{value}: {done.stderr}"
    found = re.findall(r"(?:elapse|\(in UTC\)|Iter\. #\d+): \w+ (\S+ \S+) UTC", done.stdout)
    return [datetime.datetime.fromisoformat(text) for text in found]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0 2 * * *", ["*-*-* 02:00:00 Europe/Berlin"]),
        ("30 2 * * mon-fri", ["Mon,Tue,Wed,Thu,Fri *-*-* 02:30:00 Europe/Berlin"]),
        ("*/15 1-3,22 * * *", ["*-*-* 01..03,22:00,15,30,45:00 Europe/Berlin"]),
        ("0 0 1,15 * 7", [
            "*-*-01,15 00:00:00 Europe/Berlin", "Sun *-*-* 00:00:00 Europe/Berlin",
        ]),
        ("0 0 */2 * sun", ["Sun *-*-01,03,05,07,09,11,13,15,17,19,21,23,25,27,29,31 00:00:00 "
                           "Europe/Berlin"]),
        ("0 0 29 2 *", ["*-02-29 00:00:00 Europe/Berlin"]),
    ],
)  # fmt: skip
def test_in_the_words_of_systemd(text: str, values: list[str]) -> None:
    assert Cron.parse(text).on_calendar("Europe/Berlin") == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it has 0 fields, not 5"),
        ("0 2 * *", "it has 4 fields, not 5"),
        ("0 0 2 * * *", "it has 6 fields, not 5"),
        ("@nightly", "it has 1 fields, not 5"),
        ("60 2 * * *", r"'60' is no minute \(0-59\)"),
        ("0 24 * * *", "'24' is no hour"),
        ("0 2 0 * *", "'0' is no day of month"),
        ("0 2 * 13 *", "'13' is no month"),
        ("0 2 * * 8", "'8' is no day of week"),
        ("0 2 * * funday", "'funday' is no day of week"),
        ("0 2 * * sat-mon", "ends before it begins"),
        ("*/0 2 * * *", "needs a range and a step above 0"),
        ("5/15 2 * * *", "needs a range and a step above 0"),
        ("-5 2 * * *", "'-5' is no minute"),
        ("1,,2 2 * * *", "'' is no minute"),
        ("0 2 L * *", "'l' is no day of month"),
        ("0 2 30 2 *", "never comes true"),
        ("0 2 31 4,6,9,11 */2", "never comes true"),
    ],
)
def test_a_wrong_expression_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        Cron.parse(text)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("@daily", "0 0 * * *"), (" @Weekly ", "0 0 * * 0"), ("@hourly", "0 * * * *")],
)
def test_crons_own_names_are_known(name: str, text: str) -> None:
    assert Cron.parse(name) == Cron.parse(text) and Cron.parse(name).text == text
