"""One file, replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.durable import is_temp, replace_file, temp_path
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


def test_temp_names_are_recognised(tmp_path: Path) -> None:
    assert is_temp(temp_path(tmp_path / "run.json"))
    assert temp_path(tmp_path / "run.json").parent == tmp_path
    assert not any(is_temp(tmp_path / name) for name in ("run.json", ".lock", ".x.tmp", "a.1.tmp"))
