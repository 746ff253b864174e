"""How a running job is shown to a person, always on stderr. Knows nothing about stages or files."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.cli.streams import say
from pipeline.job.observer import Observer, Planning, Snapshot
from pipeline.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_EVERY_S = 30.0
_SEEN_FROM_S = 1.0


class PlainObserver(Observer):
    """Lines on stderr: what is said at once, the state every 30 s."""

    def __init__(self, every_s: float = _PLAIN_EVERY_S) -> None:
        self._every_s = every_s
        self._shown_at = time.monotonic()

    def say(self, line: str) -> None:
        say(line)

    def show_planning(self, planning: Planning) -> None:
        if self.is_due():
            self.say(planning_line(planning))

    def show(self, snapshot: Snapshot) -> None:
        if self.is_due():
            self.say(plain_line(snapshot))

    def is_due(self) -> bool:
        """Whether the last state was shown long enough ago; then this one counts as shown."""
        now = time.monotonic()
        if now - self._shown_at < self._every_s:
            return False
        self._shown_at = now
        return True


class BarObserver(Observer):
    """A bar on a terminal; lines that are said appear above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._name = ""  # of the bar
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        with suppress(OSError):  # a terminal that has gone ends no job
            self._console.print(visible(line), highlight=False, markup=False)

    def show_planning(self, planning: Planning) -> None:
        """Move a bar of its own, if the plan takes long enough to see one."""
        if planning.elapsed_s > _SEEN_FROM_S:
            is_read = planning.rows_done == planning.rows_total
            eta = "" if planning.eta_s is None else f" ETA {format_duration(planning.eta_s)}"
            detail = "building the plan" if is_read else f"planning{eta}"
            self._move("planning", planning.rows_done, planning.rows_total, detail)

    def show(self, snapshot: Snapshot) -> None:
        self._move("rows", snapshot.rows_done, snapshot.rows_total, _detail(snapshot))

    def _move(self, name: str, done: int, total: int, detail: str) -> None:
        with suppress(OSError):
            if self._progress is None or self._task is None or self._name != name:
                self.close()
                self._progress, self._name = _make_bar(self._console), name
                self._task = self._progress.add_task(name, total=total, detail="")
                self._progress.start()
            self._progress.update(self._task, completed=done, detail=detail, refresh=True)

    def close(self) -> None:
        """Take the live display down; its last state stays on the screen."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = self._task = None  # another job may follow, with a bar of its own


def _make_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        auto_refresh=False,
    )


def _detail(snapshot: Snapshot) -> str:
    rates = snapshot.rates()
    parts = [
        f"pre {_short(rates['prefill_tokens_per_s'])}/s",
        f"dec {_short(rates['decode_tokens_per_s'])}/s",
        f"saved {_short(snapshot.saved_tokens)}",
    ]
    if snapshot.rows_failed:
        parts.append(f"{snapshot.rows_failed} failed")
    if snapshot.eta_s is not None:
        parts.append(f"ETA {format_duration(snapshot.eta_s)}")
    return " ".join(parts)


def plain_line(snapshot: Snapshot) -> str:
    """The state as one line of text."""
    rates = snapshot.rates()
    eta = "unknown" if snapshot.eta_s is None else format_duration(snapshot.eta_s)
    return (
        f"{snapshot.rows_done}/{snapshot.rows_total} rows, {snapshot.rows_failed} failed, "
        f"prefill {_short(rates['prefill_tokens_per_s'])} tok/s, "
        f"decode {_short(rates['decode_tokens_per_s'])} tok/s, "
        f"{_short(snapshot.saved_tokens)} tokens saved, ETA {eta}"
    )


def planning_line(planning: Planning) -> str:
    """The state of a plan as one line of text."""
    if planning.rows_done == planning.rows_total:
        return f"planning: all {planning.rows_total} rows read, building the plan"
    eta = "unknown" if planning.eta_s is None else format_duration(planning.eta_s)
    return f"planning: {planning.rows_done} of {planning.rows_total} rows read, ETA {eta}"


def _short(number: float) -> str:
    """At most four characters and a unit: 950, 1.2k, 35k, 1.2M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_bytes(count: int) -> str:
    """`512 B`, `1.5 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
