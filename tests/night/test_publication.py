"""Publications in a folder: the gate, one rename, and what is left of those that were cut off."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import AuditFailed, CoppiceError, RunDirectoryError, StorageError, UsageError
from pipeline.location import Location
from pipeline.night import folder_target
from pipeline.night.folder_target import FolderTarget
from pipeline.night.publication import Published, publish_by_hand, publish_run
from pipeline.night.published import Content
from pipeline.storage.lock import FolderLock
from pipeline.storage.run_directory import RunDirectory
from tests.night.job import DAY, NightlyJob
from tests.night.publisher import content, publish_and_die
from tests.torture.disk import CODES, KILLED, WRITES, FailingDisk, WatchedDisk, When
from tests.torture.victim import Server

DATE = DAY.isoformat()


def publish(job: NightlyJob) -> Published:
    return publish_run(Location(job.run_directory()), Location(job.published), "reviews", DAY)


def hidden(target: Path) -> list[str]:
    """Staging folders that were left over."""
    return [path.name for path in target.glob(".staging")]


def published_in(target: Path) -> list[Path]:
    """What readers find, whose tools take hidden folders for any other (polars, pathlib)."""
    return list(target.glob("*/data/*.parquet"))


def publish_the_next(target: Path, found: Content, expected: set[str]) -> None:
    """This date unless it is published, then another; nothing may be left over."""
    if not published_in(target):
        FolderTarget(target).publish(DATE, found)
    FolderTarget(target).publish("2026-11-23", found)
    assert set(tree(target / DATE)) == set(tree(target / "2026-11-23")) == expected
    assert hidden(target) == []


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_parts_are_copied_and_the_marker_describes_all(audited: NightlyJob) -> None:
    done = publish(audited)
    assert done == Published(str(audited.published / DATE), 1, 4, is_new=True)
    (part,) = (audited.run_directory() / "data").iterdir()
    copy = audited.published / DATE / "data" / part.name
    assert not copy.samefile(part) and copy.read_bytes() == part.read_bytes()
    marker = json.loads((audited.published / DATE / "published.json").read_text())
    assert marker["files"][f"data/{part.name}"]["sha256"].startswith(part.stem.split("-")[-1])
    for name, described in marker["files"].items():
        assert (audited.published / DATE / name).stat().st_size == described["bytes"]
    assert marker["audit"] == "pass" and marker["rows_failed"] == 0
    rows = pl.read_parquet(audited.published / "*" / "data" / "*.parquet")
    assert rows.height == marker["rows"] == 4


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whoever_may_read_the_folder_may_read_what_is_published(
    audited: NightlyJob, umask: int, mode: int
) -> None:
    """Seen red: files of the run, which are its user's alone, published as they were."""
    before = os.umask(umask)
    try:
        publish(audited)
    finally:
        os.umask(before)
    files = [path for path in (audited.published / DATE).rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_published_again_there_is_nothing_to_do(audited: NightlyJob) -> None:
    publish(audited)
    before = tree(audited.published)
    assert not publish(audited).is_new and tree(audited.published) == before


def test_where_the_kernel_cannot_copy_files_are_read_and_written(
    audited: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    publish(audited)
    (part,) = (audited.run_directory() / "data").iterdir()
    copy = audited.published / DATE / "data" / part.name
    assert not copy.samefile(part) and copy.read_bytes() == part.read_bytes()


@pytest.mark.parametrize(
    ("harm", "kind", "code", "says"),
    [
        ("no seal", RunDirectoryError, 2, "not complete"),
        ("no audit", RunDirectoryError, 2, "was not audited"),
        ("failed audit", AuditFailed, 4, "failed, so it is not published"),
        ("stale audit", RunDirectoryError, 2, "has changed since its audit"),
        ("damaged audit", RunDirectoryError, 2, "is damaged"),
        ("altered part", StorageError, 1, "was altered after it was written"),
    ],
)
def test_the_gate(
    audited: NightlyJob, harm: str, kind: type[CoppiceError], code: int, says: str
) -> None:
    """Seen red: each check left out."""
    run = audited.run_directory()
    summary = run / "audit" / "summary.json"
    found = json.loads(summary.read_text())
    (part,) = (run / "data").iterdir()
    if harm == "no seal":
        (run / "_SUCCESS").unlink()
    elif harm == "no audit":
        summary.unlink()
    elif harm == "failed audit":
        summary.write_text(json.dumps(found | {"verdict": "fail"}))
    elif harm == "stale audit":
        summary.write_text(json.dumps(found | {"seed": found["seed"] ^ 1}))
    elif harm == "damaged audit":
        summary.write_text("{")
    else:
        os.chmod(part, 0o600)
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(kind, match=says) as error:
        publish(audited)
    assert error.value.exit_code == code
    assert audited.days_published() == [] and hidden(audited.published) == []


@pytest.mark.fault(
    "disk full at publish",
    injected="every file operation of a publication refused once, or from then on",
    outcome="nothing of it is published, or all; a later call publishes it; nothing is left over",
)
@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_every_operation_of_a_publication_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lasts: bool
) -> None:
    """Seen red: `shutil.move` file by file in place of the rename."""
    target, found = tmp_path / "published", content(tmp_path / "run")
    with monkeypatch.context() as patch:
        disk = WatchedDisk(patch, tmp_path)
        FolderTarget(target).publish(DATE, found)
    expected, num_failed = set(tree(target / DATE)), 0
    for number in range(len(disk.operations)):
        shutil.rmtree(target)
        with monkeypatch.context() as patch:
            FailingDisk(patch, tmp_path, number, code, lasts)
            try:
                FolderTarget(target).publish(DATE, found)
            except CoppiceError as error:
                num_failed += 1
                assert os.strerror(code) in str(error)
        publish_the_next(target, found, expected)
    assert num_failed >= len(disk.operations) // 2  # the others are what is removed afterwards


def test_a_disk_that_is_full_is_a_sentence(
    audited: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole publication, the report that it makes included."""
    with monkeypatch.context() as patch:
        FailingDisk(patch, audited.folder, 0, errno.ENOSPC, lasts=True)
        with pytest.raises(StorageError, match="No space left on device.*free or repair the disk"):
            publish(audited)
    assert audited.days_published() == []
    assert publish(audited).is_new


@pytest.mark.fault(
    "SIGKILL at publish",
    injected="every file operation of a publication kills, before, halfway or after",
    outcome="readers see nothing of it or all; the next one removes what was left and publishes",
)
def test_a_publication_that_is_killed_at_any_moment(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: left-overs not removed at the start."""
    target = tmp_path / "disk" / "published"
    target.parent.mkdir()
    found = content(tmp_path / "run")
    with monkeypatch.context() as patch:
        disk = WatchedDisk(patch, target.parent)
        FolderTarget(target).publish(DATE, found)
    expected = set(tree(target / DATE))
    assert len(disk.operations) > 15
    num_left = 0
    for number, operation in enumerate(disk.operations):
        moments: list[When] = ["before", "halfway"] if operation.name in WRITES else ["before"]
        for when in moments:
            shutil.rmtree(target, ignore_errors=True)
            victim = server.start(publish_and_die, tmp_path, target, number, when)
            victim.join()
            assert victim.exitcode == KILLED
            num_left += len(hidden(target))
            seen = published_in(target)
            assert not seen or set(tree(target / DATE)) == expected
            publish_the_next(target, found, expected)
    assert num_left > 5


def test_readers_never_see_half_a_night(
    audited: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a glob finds before each operation. Seen red: staging one level higher."""
    seen = []

    class Reader(WatchedDisk):
        def perform(self, number: int, operation: Any, call: Any) -> Any:
            seen.append(frozenset(str(p) for p in published_in(audited.published)))
            return call()

    with monkeypatch.context() as patch:
        Reader(patch, audited.published)
        publish(audited)
    (part,) = (audited.run_directory() / "data").iterdir()
    whole = str(audited.published / DATE / "data" / part.name)
    assert set(seen) == {frozenset(), frozenset({whole})}


def recompute(job: NightlyJob) -> None:
    """The same run directory loses a part, and answers and audits its rows again."""
    (part,) = (job.run_directory() / "data").iterdir()
    part.unlink()
    (job.run_directory() / "audit" / "summary.json").unlink()
    job.say(publish=None)
    assert job.sit()[0].state == "completed"


def test_a_later_state_of_the_same_run_takes_the_place_of_the_earlier(
    audited: NightlyJob,
) -> None:
    publish(audited)
    before = json.loads((audited.published / DATE / "published.json").read_text())
    recompute(audited)
    done = publish_run(
        Location(audited.run_directory()),
        Location(audited.folder / "published"),
        "reviews",
        DAY,
    )
    assert done.is_new
    after = json.loads((audited.published / DATE / "published.json").read_text())
    assert before["run_id"] == after["run_id"] and before["edition"] != after["edition"]
    assert len(list((audited.published / DATE / "data").iterdir())) == 1
    assert hidden(audited.published) == []


def test_where_folders_cannot_be_exchanged_the_earlier_state_stays(
    audited: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(audited)
    before = tree(audited.published)
    recompute(audited)

    class Libc:
        def renameat2(self, *_: Any) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    with pytest.raises(RunDirectoryError, match="move it away"):
        publish(audited)
    assert tree(audited.published) == before and hidden(audited.published) == []


@pytest.mark.fault(
    "publish target of somebody else",
    injected="the date holds another run, other files, or a damaged marker",
    outcome="refused with a sentence; what is there stays",
)
@pytest.mark.parametrize("there", ["another run", "another job", "files", "damaged"])
def test_what_is_there_stays(audited: NightlyJob, there: str) -> None:
    """Seen red: `replaces` whatever is there."""
    place = audited.published / DATE
    publish(audited)
    marker = json.loads((place / "published.json").read_text())
    if there == "another run":
        changed = marker | {"run_created_at": "2026-11-22T00:00:00+00:00", "edition": "other"}
    else:
        changed = marker | {"job": "questions", "edition": "other"}
    (place / "published.json").write_text(json.dumps(changed) if there != "damaged" else "{")
    if there == "files":
        (place / "published.json").unlink()
    before = tree(audited.published)
    with pytest.raises(RunDirectoryError, match="move (it|.*) away") as error:
        publish(audited)
    assert error.value.exit_code == 2
    assert tree(audited.published) == before and hidden(audited.published) == []


def test_two_publishers_do_not_meet(audited: NightlyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, but not for ever. Seen red: no lock."""
    monkeypatch.setattr(folder_target, "_WAIT_S", 0.2)
    audited.published.mkdir()
    lock = FolderLock(audited.published)
    try:
        with pytest.raises(RunDirectoryError, match="in use by process"):
            publish(audited)
    finally:
        lock.release()
    monkeypatch.setattr(folder_target, "_WAIT_S", 60.0)
    lock = FolderLock(audited.published)
    soon = threading.Timer(0.3, lock.release)
    soon.start()
    assert publish(audited).is_new
    soon.join()


def test_a_target_that_cannot_be_written_is_named(audited: NightlyJob) -> None:
    """The tests may run as root, whom no mode stops: a file stands where the folder should."""
    audited.published.write_text("")
    with pytest.raises(CoppiceError, match="published"):
        publish(audited)
    assert audited.published.read_text() == ""


@pytest.mark.parametrize("target", [".", "data", "..", "../published/x/.."])
def test_a_target_in_the_run_or_around_it_is_refused(audited: NightlyJob, target: str) -> None:
    run = audited.run_directory()
    if target == "../published/x/..":  # a link that leads back
        (run.parent / "published").symlink_to(run)
        target = "../published"
    with pytest.raises(UsageError, match="must not lie in one another"):
        publish_by_hand(Location(run), Location(run / target), None, None)


def test_by_hand_date_and_job_come_from_the_path(audited: NightlyJob) -> None:
    publish(audited)
    again = publish_by_hand(
        Location(audited.run_directory()),
        Location(audited.published),
        None,
        None,
    )
    assert not again.is_new
    other = audited.folder / "elsewhere"
    shutil.copytree(audited.run_directory(), other)
    with pytest.raises(UsageError, match="--date"):
        publish_by_hand(Location(other), Location(audited.published), None, None)
    done = publish_by_hand(Location(other), Location(audited.published), "2026-11-25", None)
    assert done.location.endswith("2026-11-25")
    marker = json.loads((audited.published / "2026-11-25" / "published.json").read_text())
    assert marker["job"] == "elsewhere"


def test_a_run_whose_summary_of_the_plan_is_gone_is_not_published(audited: NightlyJob) -> None:
    """Its hash says which plan the rows are of."""
    (audited.run_directory() / "plan" / "summary.json").unlink()
    with pytest.raises(
        RunDirectoryError, match="plan/summary.json is gone; run the same job again"
    ):
        publish(audited)
    assert audited.days_published() == []


def test_a_report_is_published_as_the_run_is_now(audited: NightlyJob) -> None:
    page = audited.run_directory() / "report.html"
    page.unlink()
    publish(audited)
    published = audited.published / DATE / "report.html"
    assert page.read_bytes() == published.read_bytes() and not page.samefile(published)
    assert RunDirectory.open(audited.run_directory()).is_sealed
