"""What was committed is there after the power was cut, and the job goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.storage import durable, part_file
from tests.torture.job import RunBench
from tests.torture.sweep import record, sweep_power_cuts


def test_what_was_said_to_be_committed_outlives_a_power_cut(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Seen red: new folders whose own names were never flushed, so that the whole output was lost;
    each fault of `PLANTED`."""
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    recording = record(bench)
    assert sweep_power_cuts(bench, recording, [None, 1], by=8).cuts > 30
    assert sweep_power_cuts(bench, recording, [None], first=len(recording.steps)).cuts == 1


def rename_only(temp: Path, path: Path) -> None:
    """As `publish`, without flushing the folder."""
    os.replace(temp, path)


def write_unflushed(path: Path, content: bytes) -> None:
    """As `write_new`, without flushing the file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        durable.write_all(file, content)
    finally:
        os.close(file)


PLANTED = {
    "a folder not flushed": ("publish", rename_only),
    "a file not flushed": ("write_new", write_unflushed),
}


@pytest.mark.parametrize("module", [pytest.param(durable, marks=pytest.mark.slow), part_file])
@pytest.mark.parametrize("fault", PLANTED)
def test_the_cut_finds_what_is_planted(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    module: object,
) -> None:
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    monkeypatch.setattr(module, *PLANTED[fault])
    recording = record(bench)
    monkeypatch.undo()
    with pytest.raises(Exception):  # noqa: B017  (an assertion, or a reader of a lost file)
        sweep_power_cuts(bench, recording, [None, 1], first=60, by=2)
