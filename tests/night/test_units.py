"""What is printed for systemd and cron, as systemd and a shell read it."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.night.dates import date_of_sitting
from pipeline.night.units import Schedule, crontab, make_schedule, serve, systemd_units
from tests.night.job import DAY
from tests.night.test_cron import needs_systemd, systemd_starts
from tests.night.test_settings import write

STRANGE = "50% off \"now\" $HOME 'it''s' back\\slash"


@pytest.fixture(params=["plain", STRANGE])
def schedule(tmp_path: Path, request: pytest.FixtureRequest) -> Schedule:
    folder = tmp_path / request.param
    folder.mkdir()
    return make_schedule(write(folder), "*/20 2,4 * * mon-fri", "Europe/Berlin")


def split_units(text: str) -> tuple[str, str]:
    """Service and timer."""
    _, service, timer = text.split("# ~/.config/systemd/user/")
    return service.partition("\n")[2], timer.partition("\n")[2]


@needs_systemd
def test_systemd_finds_no_fault_in_the_units(schedule: Schedule, tmp_path: Path) -> None:
    """Seen red: `SuccessExitStatus` misspelt. A single `%` it lets pass: see the next test."""
    folder = tmp_path / "units"
    folder.mkdir()
    service, timer = split_units(systemd_units(schedule, DAY))
    (folder / "coppice-reviews.service").write_text(service)
    (folder / "coppice-reviews.timer").write_text(timer)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no",
         str(folder / "coppice-reviews.service"), str(folder / "coppice-reviews.timer")],
        capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "coppice-reviews" in line]
    assert done.returncode == 0 and said == [], done.stderr


@needs_systemd
@pytest.mark.fault(
    "summer time",
    injected="a systemd timer at an hour that the clock skips once a year",
    outcome="the night begins an hour later that day; it would not at all by the cron line alone",
)
@pytest.mark.parametrize(
    ("cron", "zone"),
    [
        ("0 2 * * *", "Europe/Berlin"),
        ("30 2 * * *", "America/New_York"),
        ("15 2 * * *", "Australia/Lord_Howe"),  # where it skips half an hour
        ("0 0 * * *", "Africa/Cairo"),
    ],
)
def test_no_timer_loses_the_night_of_summer_time(tmp_path: Path, cron: str, zone: str) -> None:
    """As systemd says for every date of two years. Seen red: the cron expression alone."""
    planned = make_schedule(write(tmp_path), cron, zone)
    values = re.findall(r"^OnCalendar=(.*)$", systemd_units(planned, DAY), re.MULTILINE)
    assert 10 <= len(values) <= 12
    begin = datetime.datetime(2026, 11, 22)
    starts = sorted(at for value in values for at in systemd_starts(value, begin, 760))
    days = [date_of_sitting(at.replace(tzinfo=datetime.UTC), zone, planned.cron) for at in starts]
    within = [day for day in days if DAY < day < DAY + datetime.timedelta(days=730)]
    assert within == [DAY + datetime.timedelta(days=ahead) for ahead in range(1, 730)]


def test_the_units_say_what_a_night_needs(schedule: Schedule) -> None:
    """As systemd splits the line: quotes, then specifiers, then variables.

    Seen red: `%` and `$` left single.
    """
    service, timer = split_units(systemd_units(schedule, DAY))
    assert "SuccessExitStatus=75\n" in service and "Environment=DO_NOT_TRACK=1\n" in service
    assert f"WorkingDirectory={str(schedule.file.parent).replace('%', '%%')}\n" in service
    (start,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(start)]
    assert words == schedule.command() and "night" in words
    assert not re.search(r"(?<!%)%(%%)*(?!%)|(?<!\$)\$(\$\$)*(?!\$)", start)
    assert "OnCalendar=Mon,Tue,Wed,Thu,Fri *-*-* 02,04:00,20,40:00 Europe/Berlin\n" in timer
    assert "Persistent=true\n" in timer


def test_cron_runs_the_command_in_its_folder(
    schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cron does it: `\\%` becomes `%`, then a shell gets the rest.

    Seen red: `%` left bare; no quotes around the file.
    """
    log = tmp_path / "log"
    python = tmp_path / "py thon"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$PWD" "$DO_NOT_TRACK" "$@" > {log}\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    comment, zone, line = crontab(schedule).splitlines()
    assert comment.startswith("#") and zone == "CRON_TZ=Europe/Berlin"
    when, command = line[: len(schedule.cron.text)], line[len(schedule.cron.text) :]
    assert when == "*/20 2,4 * * mon-fri"
    assert "%" not in command.replace("\\%", "")
    subprocess.run(["/bin/sh", "-c", command.replace("\\%", "%")], check=True)
    folder, tracked, *words = log.read_text().splitlines()
    assert (folder, tracked) == (str(schedule.file.parent), "1")
    assert words == schedule.command()[1:]


def test_the_command_that_is_printed_runs(tmp_path: Path) -> None:
    """A night without input, from another folder: exit code 2 and a sentence."""
    folder = tmp_path / "a b"
    folder.mkdir()
    file = write(folder, engine="echo", model=str(tmp_path))
    planned = make_schedule(file, "0 2 * * *", "UTC")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        planned.command(), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "is its disk mounted?" in done.stderr and "Failed" in done.stdout


def test_what_cannot_be_written_in_a_line_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    planned = make_schedule(write(folder), "0 2 * * *", "UTC")
    for show in (lambda: systemd_units(planned, DAY), lambda: crontab(planned)):
        with pytest.raises(UsageError, match="rename it"):
            show()


def test_without_printing_prefect_serves(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        "pipeline.night.units.os.execv", lambda path, words: called.append((path, words))
    )
    serve(schedule, "nightly")
    ((path, words),) = called
    assert path == sys.executable
    assert words == [
        sys.executable, "-P", "-m", "kvcoppice.flows", "schedule", str(schedule.file),
        "--cron", "*/20 2,4 * * mon-fri", "--timezone", "Europe/Berlin", "--name", "nightly",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "cron", "timezone"),
    [
        ({"catch_up": -1}, "0 2 * * *", "UTC"),
        ({}, "0 2 * *", "UTC"),
        ({}, "0 2 * * *", "Europe/Berln"),
    ],
)
def test_nothing_wrong_is_scheduled(
    tmp_path: Path, keys: dict[str, object], cron: str, timezone: str
) -> None:
    with pytest.raises(UsageError):
        make_schedule(write(tmp_path, **keys), cron, timezone)
