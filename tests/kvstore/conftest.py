"""Tests of the store wait for no disk, and those of small models compute on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kvstore.torture import skip_flushes


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flush is for, the power cuts play through."""
    skip_flushes(monkeypatch)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads wait for each other where other programs run, and small models need none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
