"""What a person sees of a running job."""

from __future__ import annotations

import io
import os

import pytest
from rich.console import Console

from pipeline.cli.logs import make_observer
from pipeline.cli.progress import (
    BarObserver,
    PlainObserver,
    format_bytes,
    format_duration,
    plain_line,
    planning_line,
)
from pipeline.job.observer import Planning, SilentObserver, Snapshot

HALF = Snapshot(
    rows_total=1_000_000,
    rows_done=600_000,
    rows_failed=12,
    rows_before=200_000,
    prefilled_tokens=90_000_000,
    saved_tokens=810_000_000,
    generated_tokens=12_800_000,
    prefill_s=9000.0,
    decode_s=6400.0,
    elapsed_s=16_000.0,
)


def test_the_eta_counts_this_sessions_rows_only() -> None:
    assert HALF.eta_s == pytest.approx(16_000.0)
    assert HALF.rates() == {
        "prefill_tokens_per_s": 10_000.0,
        "decode_tokens_per_s": 2000.0,
        "rows_per_s": 25.0,
    }


def test_the_plain_line_says_it_all() -> None:
    assert plain_line(HALF) == (
        "600000/1000000 rows, 12 failed, prefill 10k tok/s, decode 2.0k tok/s, "
        "810M tokens saved, ETA 4h26m"
    )


def test_nothing_is_known_before_the_first_row() -> None:
    start = Snapshot(10, 0, 0, 1.0, 0, 0, 0, 0, 0.0, 0.0)
    assert start.eta_s is None
    assert "ETA unknown" in plain_line(start)


def test_planning_is_shown_with_counts_and_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen red: nothing was said while 75 s of planning went by."""
    some, last = Planning(1000, 400, 100, 30.0), Planning(1000, 1000, 0, 90.0)
    assert planning_line(some) == "planning: 400 of 1000 rows read, ETA 1m00s"
    assert planning_line(last) == "planning: all 1000 rows read, building the plan"
    PlainObserver(every_s=0.0).show_planning(some)
    assert "400 of 1000 rows read" in capsys.readouterr().err
    observer, screen = BarObserver(), io.StringIO()
    observer._console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    observer.show_planning(Planning(1000, 10, 0, 0.5))
    assert screen.getvalue() == "", "what is over in a moment needs no bar"
    observer.show_planning(some)
    observer.show_planning(last)
    observer.show(HALF)
    observer.close()
    shown = screen.getvalue()
    assert "400/1000" in shown and "planning ETA 1m00s" in shown and "building the plan" in shown
    assert "600000/1000000" in shown


def test_a_terminal_that_has_gone_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1, closefd=False)
    monkeypatch.setattr("sys.stderr", full)
    plain, bar = PlainObserver(every_s=0.0), BarObserver()
    bar._console = Console(file=full, width=80, force_terminal=True)
    for observer in (plain, bar):
        observer.say("a line")
        observer.show(HALF)
        observer.close()


def test_the_bar_fits_80_columns() -> None:
    observer = BarObserver()
    screen = io.StringIO()
    observer._console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    observer.show(HALF)
    observer.close()
    shown = [line for line in screen.getvalue().split("\n") if "600000/1000000" in line]
    assert shown and "ETA 4h26m" in shown[-1] and "12 failed" in shown[-1]


def test_plain_progress_is_rare_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    observer = PlainObserver(every_s=3600.0)
    observer.say("a header")
    observer.show(HALF)
    observer.close()
    assert capsys.readouterr() == ("", "a header\n")
    PlainObserver(every_s=0.0).show(HALF)
    assert "600000/1000000 rows" in capsys.readouterr().err


def test_auto_is_plain_where_there_is_no_terminal() -> None:
    assert isinstance(make_observer("auto"), PlainObserver)
    assert isinstance(make_observer("none"), SilentObserver)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text
