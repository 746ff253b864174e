"""The host's own time for a decode step at 256 rows, beside a device that does nothing."""

from __future__ import annotations

import pytest

from benchmarks.gpu.host import KINDS, IdleDevice

MOST_CALLS = 200  # of a step: fewer than one for each row


@pytest.fixture(scope="module")
def device() -> IdleDevice:
    return IdleDevice(256)


def test_a_steady_step_touches_no_row(device: IdleDevice) -> None:
    """Seen red: 2,600 calls, several for each row."""
    calls = device.steady_calls(KINDS["greedy"])
    assert calls < MOST_CALLS, f"{calls:.0f} calls a step of 256 rows"
