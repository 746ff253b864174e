"""A share of the torture of the store; `python -m tests.kvstore.torture` does all of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.kvstore import entry, store
from pipeline.storage import durable
from tests.kvstore import torture
from tests.sweeps import diagonal
from tests.torture.disk import When
from tests.torture.test_power_cut import rename_only
from tests.torture.victim import Server


@pytest.mark.fault(
    "disk full or EIO",
    injected="each file operation of a KV store fails, once or from then on",
    outcome="the job goes on without what could not be kept; what was kept is there and right",
)
@pytest.mark.parametrize(
    ("failure", "budget"),
    diagonal(
        ((errno.EIO, False), (errno.ENOSPC, True), (errno.ENOSPC, False)),
        (torture.SMALL, torture.LARGE),
    ),
)
def test_any_operation_may_fail(tmp_path: Path, failure: tuple[int, bool], budget: int) -> None:
    """Seen red: an entry that was renamed and counted nowhere, because its folder could not be
    flushed: the store outgrew its budget."""
    assert torture.sweep_errors(tmp_path, *failure, range(0, 10_000, 2), budget) > 30


@pytest.mark.fault(
    "SIGKILL",
    injected="a job with a KV store killed before, halfway through and after its file operations",
    outcome="the next job finds right entries or none, no temporary file, and goes on",
)
@pytest.mark.slow
@pytest.mark.parametrize(("when", "by"), [("before", 6), ("halfway", 9), ("after", 7)])
def test_a_job_may_be_killed_at_any_operation(
    tmp_path: Path, server: Server, when: When, by: int
) -> None:
    assert torture.sweep_kills(tmp_path, server, when, range(by // 2, 10_000, by)) > 8


@pytest.mark.fault(
    "SIGKILL",
    injected="kill -9 at random moments of a KV store that takes entries and evicts them",
    outcome="no wrong entry, no half one, within the budget",
)
@pytest.mark.slow
def test_a_job_may_be_killed_at_any_moment(tmp_path: Path, server: Server) -> None:
    assert torture.kill_at_random(tmp_path, server, kills=6, seed=1) > 6


@pytest.mark.parametrize("budget", [torture.SMALL, torture.LARGE])
def test_what_was_kept_outlives_a_power_cut(tmp_path: Path, budget: int) -> None:
    assert torture.sweep_power_cuts(tmp_path, budget, [None, 1], by=3) > 40


def write_unflushed(path: Path, chunks: list[bytes | memoryview]) -> None:
    """As `write_stream`, without flushing the file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for chunk in chunks:
            durable.write_all(file, chunk)
    finally:
        os.close(file)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [(store, "publish", rename_only), (entry, "write_stream", write_unflushed)],
    ids=["a folder not flushed", "a file not flushed"],
)
def test_the_power_cut_finds_what_is_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, fault: object
) -> None:
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        torture.sweep_power_cuts(tmp_path, torture.LARGE, [None])


def test_the_errors_find_what_is_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry under its final name before it is whole."""
    monkeypatch.setattr(store, "temp_path", lambda path: path)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    with pytest.raises(AssertionError):
        torture.sweep_errors(tmp_path, errno.ENOSPC, False, torture.ALL, torture.LARGE)
