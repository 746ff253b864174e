"""Locks removed, linked, shared, or taken by many at once: one writer, and none refused."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import FolderInUse, RunDirectoryError, UsageError
from pipeline.job.device_lock import holding_device
from pipeline.job.observer import SilentObserver
from pipeline.night.folder_target import FolderTarget
from pipeline.settings import JobSettings
from pipeline.storage.lock import FileLock, FolderLock, HeldElsewhere, is_abandoned
from pipeline.storage.run_directory import RunDirectory
from tests.night.publisher import content

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def open_run(folder: Path) -> RunDirectory:
    return RunDirectory.create_or_resume(folder, {"input": "abc"}, {})


def test_a_second_writer_is_refused_where_the_lock_file_was_removed(tmp_path: Path) -> None:
    """Seen red: `rm out/.lock` let two writers in."""
    first = open_run(tmp_path / "out")
    (tmp_path / "out" / ".lock").unlink()
    assert not is_abandoned(tmp_path / "out")
    with pytest.raises(FolderInUse, match="in use"):
        open_run(tmp_path / "out")
    first.update_manifest(status="stopped")
    first.close()
    open_run(tmp_path / "out").close()


@pytest.mark.parametrize("act", ["write_part", "update_manifest"])
def test_a_writer_whose_folder_was_replaced_stops(tmp_path: Path, act: str) -> None:
    first = open_run(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "old")
    second = open_run(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="moved away or deleted"):
        if act == "write_part":
            first.write_part(0, pa.table({"row_index": [0]}), {})
        else:
            first.update_manifest(status="stopped")
    assert list(second.data.iterdir()) == []
    first.close()
    second.close()


def test_a_lock_file_that_is_removed_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "x.lock", 0
    take = FileLock._take

    def remove_first(lock: FileLock) -> str:
        nonlocal opened
        opened += 1
        if opened == 1:
            path.unlink()
        return take(lock)

    monkeypatch.setattr(FileLock, "_take", remove_first)
    lock = FileLock(path)
    with pytest.raises(HeldElsewhere):
        FileLock(path)
    lock.release()


def test_a_linked_file_is_no_lock_and_is_neither_emptied_nor_opened_to_others(
    tmp_path: Path,
) -> None:
    """Seen red: the lock's name as a second link to a file of ours emptied it."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    secret.chmod(0o600)
    os.link(secret, tmp_path / "device.lock")
    with pytest.raises(OSError, match="link"):
        FileLock(tmp_path / "device.lock", 0o666)
    assert secret.read_text() == "a key" and secret.stat().st_mode & 0o777 == 0o600


def test_first_jobs_started_together_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: 142 of 1,200 ended with "File exists"."""
    settings = JobSettings.from_flat({"model": "m", "device": "cpu"})

    def hold(folder: Path) -> None:
        monkeypatch.setenv("COPPICE_LOCKS", str(folder))
        with holding_device(settings, SilentObserver()):
            pass

    mkdir = Path.mkdir

    def late(path: Path, *args: Any, **options: Any) -> None:
        if path.name.startswith("locks") and not path.exists():
            mkdir(path, parents=True)  # the other job's, just now
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    for number in range(3):
        hold(tmp_path / f"locks-{number}")


def test_folders_of_runs_started_together_are_made_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: open_run(tmp_path / "job" / f"out-{n}"), range(64)))
    for run in made:
        run.close()


def test_a_lock_folder_that_is_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COPPICE_LOCKS", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "coppice-locks").symlink_to(tmp_path / "elsewhere")
    settings = JobSettings.from_flat({"model": "m", "device": "cpu"})
    with (
        pytest.raises(UsageError, match="is a link"),
        holding_device(settings, SilentObserver()),
    ):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


_PUBLISH = """
import os, sys
from pathlib import Path
from pipeline.night.folder_target import FolderTarget
from pipeline.night.published import Content
user, umask, target, page, day = sys.argv[1:]
os.setgroups([]); os.setgid(4242); os.setuid(int(user)); os.umask(int(umask, 8))
content = Content({"edition": "run-1"}, {"report.html": Path(page)}, None)
FolderTarget(Path(target)).publish(day, content)
"""


@as_root
@pytest.mark.parametrize("umask", ["002", "022", "077"])
def test_a_second_user_publishes_into_a_shared_folder(umask: str) -> None:
    """Seen red: the first one's `.lock` was 0600."""
    with tempfile.TemporaryDirectory() as place:  # every user can get there
        os.chmod(place, 0o755)
        page, target = Path(place) / "page", Path(place) / "published"
        page.write_text("page")
        page.chmod(0o644)
        target.mkdir()
        os.chown(target, 0, 4242)
        target.chmod(0o2775)
        for user, day in (("5001", "2026-11-22"), ("5002", "2026-11-23")):
            said = (user, umask, str(target), str(page), day)
            command = [sys.executable, "-c", _PUBLISH, *said]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in target.glob("2026*")) == ["2026-11-22", "2026-11-23"]


def test_what_another_user_left_in_staging_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "published"
    left = target / ".staging" / "2026-11-21-run-0"
    left.mkdir(parents=True)

    def refuse(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    FolderTarget(target).publish("2026-11-22", content(tmp_path / "run"))
    assert (target / "2026-11-22" / "report.html").exists()


def test_a_lock_of_a_file_system_without_locks_on_folders_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses to lock what is not opened for writing."""
    flock = fcntl.flock

    def only_files(file: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(9, "Bad file descriptor")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", only_files)
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path)
    lock.release()
