"""What a library prints while it panics is not seen; what others print is."""

from __future__ import annotations

import os

import pytest

from pipeline.unheard import panics_unheard


def test_only_a_panic_is_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_unheard():
        os.write(2, b"said by another thread\n")
    assert capfd.readouterr().err == "said by another thread\n"

    for said, heard in (("thread 'x' panicked at a.rs:1:2\n", ""), ("said\n", "said\n")):
        with pytest.raises(ValueError), panics_unheard():
            os.write(2, said.encode())
            raise ValueError
        assert capfd.readouterr().err == heard


def test_no_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with panics_unheard():
            pass
    assert len(os.listdir("/proc/self/fd")) == before
