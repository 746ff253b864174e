"""Which files may be written, and which are somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.storage.targets import check_apart, check_replaceable, folder_to_write


def test_our_own_file_an_empty_one_and_none_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("# HELP rows")
    (tmp_path / "empty").touch()
    for name in ("ours", "empty", "none", "no/folder"):
        check_replaceable(tmp_path / name, [b"# HELP"], "--metrics-file")


def test_another_file_and_a_folder_may_not(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("# Help wanted")
    with pytest.raises(UsageError, match="theirs is there and holds something else; .*--html"):
        check_replaceable(tmp_path / "theirs", [b"# HELP"], "--html")
    with pytest.raises(UsageError, match=r"cannot write .* \(Is a directory\); see --html"):
        check_replaceable(tmp_path, [b"# HELP"], "--html")


def test_the_deepest_folder_that_is_there_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder_to_write(tmp_path / "a" / "b") == (tmp_path, None)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        there = tmp_path / name
        assert folder_to_write(there / "b") == (there, f"{there} is a file")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # of root all are writable
    assert folder_to_write(tmp_path / "a") == (tmp_path, f"you may not write to {tmp_path}")


def test_a_run_is_not_written_into_its_input(tmp_path: Path) -> None:
    check_apart(Location(tmp_path), Location(tmp_path / "out"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="link is the input; choose another -o, like .*link/out"):
        check_apart(Location(tmp_path), Location(tmp_path / "link"))
