"""Publications below s3://: the marker comes last, and only one publisher's counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CoppiceError, RunDirectoryError, StorageError
from pipeline.location import Location
from pipeline.night.calendar import forget_due, mark_due, unfinished_before
from pipeline.night.ending import NightFailure
from pipeline.night.publication import publish_run
from pipeline.night.published import Content
from pipeline.night.store_target import StoreTarget
from pipeline.storage.remote_folder import RemoteFolder
from tests.night.job import DAY, NightlyJob, before
from tests.night.publisher import content
from tests.storage.buckets import FailingStore, Store

DATE = DAY.isoformat()


def publish(bucket: str, found: Content) -> None:
    """A target of its own each time; making one takes a while."""
    StoreTarget(Location(f"s3://{bucket}/published")).publish(DATE, found)


def marker(store: Store, bucket: str) -> dict[str, Any] | None:
    key = f"published/{DATE}/published.json"
    found: dict[str, Any] = json.loads(store.get(bucket, key)) if key in store.keys(bucket) else {}
    return found or None


def check_whole(store: Store, bucket: str, found: Content) -> None:
    """The marker names files that are there, with the bytes that were given; and no other file."""
    named = marker(store, bucket)
    assert named is not None and named["edition"] == found.edition
    prefix = f"published/{DATE}/"
    assert {f"{prefix}{name}" for name in named["files"]} == {
        key for key in store.keys(bucket) if not key.endswith("/published.json")
    }
    contents = {path.read_bytes() for path in found.files.values()}
    assert {store.get(bucket, prefix + name) for name in named["files"]} == contents


def test_readers_go_by_the_marker(store: Store, bucket: str, tmp_path: Path) -> None:
    found = content(tmp_path)
    publish(bucket, found)
    check_whole(store, bucket, found)
    held = StoreTarget(Location(f"s3://{bucket}/published/")).read(DATE)
    assert held == marker(store, bucket)
    later = content(tmp_path, held, state=2)
    publish(bucket, later)
    check_whole(store, bucket, later)


def test_who_knew_of_no_publication_replaces_none(
    store: Store, bucket: str, tmp_path: Path
) -> None:
    """One that was made since it looked: it stays, and nothing is left beside it."""
    publish(bucket, content(tmp_path))
    before = store.keys(bucket)
    with pytest.raises(RunDirectoryError, match="somebody else published .* meanwhile"):
        publish(bucket, content(tmp_path, state=2))
    assert store.keys(bucket) == before
    check_whole(store, bucket, content(tmp_path))


@pytest.mark.fault(
    "store that fails at publish",
    injected="every call to the store refused once, or done with its answer lost",
    outcome="no marker, or a marker whose files are all there; a later call publishes the same",
)
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("replaces", [False, True])
def test_every_call_to_the_store_fails(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool, replaces: bool
) -> None:
    """Seen red: the marker first; files removed though the marker was there, its answer lost."""
    bucket, first = store.new_bucket(), content(tmp_path)
    target = StoreTarget(Location(f"s3://{bucket}/published"))

    def prepare() -> Content:
        for key in store.keys(bucket):
            store.delete(bucket, key)
        if not replaces:
            return first
        target.publish(DATE, first)
        return content(tmp_path, marker(store, bucket), state=2)

    found = prepare()
    with monkeypatch.context() as patch:
        calls = FailingStore(patch)
        target.publish(DATE, found)
    num_failed = 0
    for number in range(len(calls.calls)):
        found = prepare()
        old = marker(store, bucket)
        with monkeypatch.context() as patch:
            FailingStore(patch, number, answered)
            try:
                target.publish(DATE, found)
            except StorageError:
                num_failed += 1
        now = marker(store, bucket)
        assert now is not None or not replaces
        if now is not None:
            for name, described in now["files"].items():
                held = store.get(bucket, f"published/{DATE}/{name}")
                assert len(held) == described["bytes"]
        if now == old:
            target.publish(DATE, found)
            check_whole(store, bucket, found)
    assert num_failed >= 4


def test_of_two_publishers_one_counts(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one commits just before our marker. Seen red: an unconditional marker."""
    ours, theirs = content(tmp_path / "a"), content(tmp_path / "b", state=2)
    real = RemoteFolder.put_if

    def late(folder: RemoteFolder, name: str, text: bytes, etag: str | None) -> str:
        monkeypatch.setattr(RemoteFolder, "put_if", real)
        publish(bucket, theirs)
        return real(folder, name, text, etag)

    monkeypatch.setattr(RemoteFolder, "put_if", late)
    with pytest.raises(RunDirectoryError, match="somebody else published"):
        publish(bucket, ours)
    check_whole(store, bucket, theirs)


def test_what_is_there_already_stays(store: Store, bucket: str, tmp_path: Path) -> None:
    store.put(bucket, f"published/{DATE}/published.json", b"{}")
    with pytest.raises(RunDirectoryError, match="is damaged .*; move"):
        publish(bucket, content(tmp_path))
    assert store.get(bucket, f"published/{DATE}/published.json") == b"{}"
    assert len(store.keys(bucket)) == 1


def test_a_run_of_a_folder_is_published_to_a_bucket(
    audited: NightlyJob, store: Store, bucket: str
) -> None:
    target = f"s3://{bucket}/published"
    done = publish_run(Location(audited.run_directory()), Location(target), "reviews", DAY)
    assert (done.location, done.is_new) == (f"{target}/{DATE}", True)
    named = marker(store, bucket)
    assert named is not None and len(named["files"]) == 3 and named["audit"] == "pass"
    assert not publish_run(
        Location(audited.run_directory()), Location(target), "reviews", DAY
    ).is_new


def test_a_bucket_says_which_nights_are_due(job: NightlyJob, store: Store, bucket: str) -> None:
    """Those that began or were to; one that is forgotten is not."""
    job.say(output=f"s3://{bucket}/nights")
    for ago in (9, 3, 1):
        mark_due(job.night(before(ago)))
    mark_due(job.night(before(3)))
    assert [night.date for night in unfinished_before(job.night())] == [before(3), before(1)]
    forget_due(job.night(before(3)))
    assert [night.date for night in unfinished_before(job.night())] == [before(1)]


@pytest.mark.slow
def test_nights_below_a_bucket(audited: NightlyJob, store: Store, bucket: str) -> None:
    """Runs and publications both there; a night that never began is caught up."""
    audited.say(output=f"s3://{bucket}/nights", publish=f"s3://{bucket}/published")
    (skipped,) = audited.sit(before(1))
    assert (
        isinstance(skipped, NightFailure)
        and skipped.error.exit_code == 2
        and store.keys(bucket) == []
    )
    (done,) = audited.sit()
    assert done.state == "completed", done.sentence()
    assert marker(store, bucket) is not None
    (again,) = audited.sit()
    assert again == done
    audited.give_input(before(-1))
    audited.say(publish=f"s3://{bucket}/elsewhere")  # so the first night is not done any more
    nights = audited.sit(before(-1))
    assert [night.date for night in nights] == [DAY, before(-1)]
    assert all(night.state == "completed" for night in nights), [n.sentence() for n in nights]


def test_a_bucket_that_is_not_there_is_named(audited: NightlyJob, store: Store) -> None:
    with pytest.raises(CoppiceError, match="there is no such bucket"):
        publish_run(
            Location(audited.run_directory()),
            Location("s3://not-there/x"),
            "reviews",
            DAY,
        )
