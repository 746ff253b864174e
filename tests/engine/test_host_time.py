"""The host's own time for a decode step at 256 rows, beside a device that does nothing."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu.host import KINDS, IdleDevice
from pipeline.engine import decoding, strides

ROWS = 256
MOST_CALLS = 400  # of a step: fewer than two for each row
MOST_TOUCHES = 5.0  # of all rows; as many take 0.15 ms where one row takes 120 ns


@pytest.fixture(scope="module")
def device() -> IdleDevice:
    return IdleDevice(ROWS)


def seconds_of_a_touch() -> float:
    """What a loop takes that does next to nothing with each row: how fast this machine is now."""
    rows = [[0, place] for place in range(ROWS)]
    best = float("inf")
    for _ in range(20):
        begin = time.process_time()
        for _ in range(40):
            for row in rows:
                row[0] += 1
                row[1] = max(row[0], row[1])
        best = min(best, (time.process_time() - begin) / 40)
    return best


def test_a_steady_step_does_not_look_at_each_row(device: IdleDevice) -> None:
    """Calls of functions, which no load of the machine changes. Seen red: 4,739."""
    calls = device.steady_calls(KINDS["greedy"])
    assert calls < MOST_CALLS, f"{calls:.0f} calls a step of {ROWS} rows"


def test_a_steady_step_takes_no_longer_than_a_few_looks_at_each_row(device: IdleDevice) -> None:
    """0.15 ms where this was written. Seen red: 21 touches, 0.63 ms."""
    touches = [device.steady_s(KINDS["greedy"]) / seconds_of_a_touch() for _ in range(2)]
    assert min(touches) < MOST_TOUCHES, f"as long as {min(touches):.1f} touches of each row"


def test_it_is_the_stride_that_saves_them(
    device: IdleDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With strides of one step the same is measured, and the bound does not hold."""
    for module in (strides, decoding):
        monkeypatch.setattr(module, "STEPS", 1)
    assert device.steady_calls(KINDS["greedy"]) > 2 * MOST_CALLS
