"""One file, replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.durable import is_temp, replace_file, temp_path, write_whole
from tests.storage.disk import CODES, FailingDisk


@pytest.mark.fault(
    "disk full or EIO",
    injected="each open, write, fsync and rename of one file",
    outcome="StorageError; the old file or the new one, no temporary",
)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("fail_at", range(6))
def test_a_failed_replacement_leaves_old_or_new_and_no_temp(
    tmp_path: Path, fail_at: int, code: int
) -> None:
    path = tmp_path / "run.json"
    replace_file(path, b"old")
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, fail_at, code)
        with pytest.raises(StorageError, match=r"run\.json"):
            replace_file(path, b"new content")
    assert path.read_bytes() == (b"new content" if "replace" in disk.calls[:fail_at] else b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("fail_at", range(5))
def test_a_failed_stream_leaves_old_or_new_and_no_temp(tmp_path: Path, fail_at: int) -> None:
    path = tmp_path / "rows.parquet"
    replace_file(path, b"old")
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, fail_at, CODES[0])
        with pytest.raises(StorageError, match=r"rows\.parquet"):
            write_whole(path, lambda file: file.write(b"new") and 1)
    assert path.read_bytes() == (b"new" if "replace" in disk.calls[:fail_at] else b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: file.write(b"half") // 0)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_temp_names_are_recognised(tmp_path: Path) -> None:
    assert is_temp(temp_path(tmp_path / "run.json"))
    assert temp_path(tmp_path / "run.json").parent == tmp_path
    # A killed process 1 of a container leaves a name that its successor, process 1, must not meet.
    assert temp_path(tmp_path / "run.json") != temp_path(tmp_path / "run.json")
    assert not any(is_temp(tmp_path / name) for name in ("run.json", ".lock", ".x.tmp", "a.1.tmp"))
