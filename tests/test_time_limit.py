"""Loops end; what ends by itself is left alone, however near to its limit."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from pipeline import time_limit
from pipeline.time_limit import TimeLimit, TookTooLong


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_a_loop_without_end_is_ended() -> None:
    """Seen red: with a watcher that looks but never interrupts."""
    limit = TimeLimit(0.2)
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(TookTooLong), limit:
            spin(60)
        assert time.monotonic() - begin < 30
    with limit:
        spin(0.01)
    assert limit.num_ended == 2


def test_a_thread_beside_the_main_one_is_ended_too() -> None:
    ends: list[str] = []

    def work() -> None:
        try:
            with TimeLimit(0.1):
                spin(60)
        except TookTooLong:
            ends.append("too long")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert ends == ["too long"]


def test_what_ends_near_its_limit_is_interrupted_within_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a watcher that is slow to strike. Seen red: with an `__exit__` that does not wait."""
    strike = time_limit._interrupt

    def late(thread: int, error: type[BaseException] | None) -> None:
        if error is not None:
            time.sleep(0.003)
        strike(thread, error)

    monkeypatch.setattr(time_limit, "_interrupt", late)
    limit, ends = TimeLimit(0.004), [0, 0]
    for number in range(200):
        try:
            with limit:
                spin(0.004 + number % 10 / 1000)
            ends[0] += 1
        except TookTooLong:
            ends[1] += 1
        spin(0.005)  # an interruption that is late would arrive here
    assert sum(ends) == 200 and ends[1] > 0


def test_the_watcher_goes_with_its_limit() -> None:
    limit = TimeLimit(0.1)
    with limit:
        watcher = limit._watcher
    assert watcher is not None and watcher.is_alive()
    del limit
    gc.collect()
    watcher.join(30)
    assert not watcher.is_alive()
