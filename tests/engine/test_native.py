"""The compiled library is built and loaded once in a process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.engine.kernels import native


@pytest.fixture
def unknown() -> Iterator[None]:
    """Nobody has asked for the library yet."""
    native._why_unavailable.cache_clear()
    yield
    native._why_unavailable.cache_clear()


@pytest.mark.usefixtures("unknown")
def test_threads_that_ask_at_once_wait_for_one_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: each built and loaded one of its own, and torch, whose operators can be registered
    once only, aborted the process."""
    built: list[Path] = []

    def build(compiler: str, library: Path) -> None:
        time.sleep(0.1)
        built.append(library)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: "c++")
    monkeypatch.setattr(native, "_library", lambda compiler: tmp_path / "native-0.so")
    monkeypatch.setattr(native, "_load", lambda library: bool(built))
    monkeypatch.setattr(native, "_build", build)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: native.why_unavailable(), range(4)))
    assert answers == [None] * 4
    assert built == [tmp_path / "native-0.so"]
