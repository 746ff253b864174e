"""A nightly job for those who have systemd or cron and nothing else. Writes texts, no files;
knows of Prefect only which process speaks to it."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.errors import TimeBudgetReached, UsageError
from pipeline.night.cron import Cron
from pipeline.night.dates import made_up_starts, open_zone
from pipeline.night.settings import read_night

_DAYS_AHEAD = 3653


@dataclass(frozen=True)
class Schedule:
    """When a night file is done: `file` absolute, `name` the job's."""

    file: Path
    name: str
    cron: Cron
    timezone: str

    def command(self) -> list[str]:
        """What does one sitting. The date follows from the expression: a late start keeps it."""
        return [
            *_python("kvcoppice"), "night", str(self.file),
            "--cron", self.cron.text, "--timezone", self.timezone, "--progress", "plain",
        ]  # fmt: skip


def make_schedule(file: Path, cron: str, timezone: str) -> Schedule:
    """Raises UsageError for a file, an expression or a zone that no night could come of."""
    open_zone(timezone)
    night = read_night(file, datetime.date.today())
    return Schedule(file.absolute(), night.settings.name, Cron.parse(cron), timezone)


def serve(schedule: Schedule, name: str | None) -> NoReturn:
    """Become the process that Prefect's server tells when to begin."""
    options = ["--cron", schedule.cron.text, "--timezone", schedule.timezone]
    options += [] if name is None else ["--name", name]
    command = [*_python("kvcoppice.flows"), "schedule", str(schedule.file), *options]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def systemd_units(schedule: Schedule, first: datetime.date) -> str:
    """A service and its timer for ten years from `first`, and where to put them. Raises UsageError.

    After that only nights that begin in the hour which summer time skips would be left out.
    """
    unit = f"coppice-{schedule.name}"
    words = " ".join(_systemd_word(word) for word in schedule.command())
    folder = _printable(str(schedule.file.parent)).replace("%", "%%")
    starts = "\n".join(f"OnCalendar={x}" for x in schedule.cron.on_calendar(schedule.timezone))
    skipped = made_up_starts(schedule.cron, schedule.timezone, first, _DAYS_AHEAD)
    if skipped:
        lines = (f"OnCalendar={x:%Y-%m-%d %H:%M:%S} {schedule.timezone}" for x in skipped)
        starts += "\n# summer time skips the start on these days, and so would systemd\n"
        starts += "\n".join(lines)
    return f"""\
# ~/.config/systemd/user/{unit}.service
[Unit]
Description=coppice: the nights of {schedule.name}

[Service]
Type=oneshot
WorkingDirectory={folder}
Environment=DO_NOT_TRACK=1
ExecStart={words}
# stopped by its time budget: the next night goes on
SuccessExitStatus={TimeBudgetReached.exit_code}
# the first signal lets rows on the device end and commits them
KillMode=mixed
TimeoutStopSec=15min

# ~/.config/systemd/user/{unit}.timer
[Unit]
Description=coppice: when the nights of {schedule.name} begin

[Timer]
{starts}
AccuracySec=1s
# a machine that slept through the start begins when it wakes
Persistent=true

[Install]
WantedBy=timers.target

# then: systemctl --user daemon-reload && systemctl --user enable --now {unit}.timer
# and once, so that it runs while nobody is logged in: loginctl enable-linger
"""


def crontab(schedule: Schedule) -> str:
    """Lines for `crontab -e`. Raises UsageError."""
    words = " ".join(shlex.quote(_printable(word)) for word in schedule.command())
    folder = shlex.quote(_printable(str(schedule.file.parent)))
    # In a crontab a bare % ends the command.
    line = f"cd {folder} && DO_NOT_TRACK=1 {words}".replace("%", "\\%")
    return f"""\
# CRON_TZ is known to cronie (Fedora, RHEL, Arch); Debian's cron takes the machine's own time zone.
CRON_TZ={schedule.timezone}
{schedule.cron.text} {line}
"""


def _python(module: str) -> list[str]:
    """How a module of ours is run in any folder, a person's own pipeline.py in it or not."""
    return [sys.executable, "-P", "-m", module]


def _systemd_word(word: str) -> str:
    text = _printable(word).replace("\\", "\\\\").replace('"', '\\"')
    text = text.replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[\w/.:+,@%$=-]+", text) else f'"{text}"'


def _printable(text: str) -> str:
    if not text.isprintable():
        raise UsageError(f"{text!r} cannot be written into a unit or crontab; rename it")
    return text
