"""Which folders are nights of one job, on this machine and in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.location import Location
from pipeline.storage.manifest import new_manifest
from pipeline.storage.nights import read_nights, read_remote_nights
from pipeline.storage.remote_copy import RemoteCopy
from pipeline.storage.remote_folder import RemoteFolder
from pipeline.store_settings import ObjectStoreSettings
from tests.storage.buckets import Store


def make_night(job: Path, name: str, manifest: str | None = None) -> Path:
    folder = job / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(manifest or json.dumps(new_manifest({})), encoding="utf-8")
    return folder


def test_nights_are_folders_named_by_date_up_to_ones_own(tmp_path: Path) -> None:
    for name in ("2026-11-09", "2026-11-12", "latest", "2026-11-1", "2026-11-10.old"):
        make_night(tmp_path, name)
    (tmp_path / "2026-11-08").mkdir()  # no run
    (tmp_path / "2026-11-07").write_text("a file")
    own = make_night(tmp_path, "2026-11-11")
    (own / "report.html").write_text("page")
    (tmp_path / "link").symlink_to(own)
    for root in (own, tmp_path / "link"):
        nights = read_nights(root)
        assert [night.date for night in nights] == ["2026-11-09", "2026-11-11"]
        assert [night.has_page for night in nights] == [False, True]
    assert read_nights(tmp_path / "latest") == []


def test_no_more_than_thirty(tmp_path: Path) -> None:
    for month in ("10", "11"):
        for day in range(1, 21):
            make_night(tmp_path, f"2026-{month}-{day:02d}")
    dates = [night.date for night in read_nights(tmp_path / "2026-11-20")]
    assert len(dates) == 30 and (dates[0], dates[-1]) == ("2026-10-11", "2026-11-20")


@pytest.mark.fault(
    "a damaged earlier night",
    injected="run.json and audit of earlier nights are cut off, of another version, no JSON",
    outcome="the night's page is made, and says of them that they are damaged",
)
@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"schema_version": 99}', "\x00"])
def test_a_damaged_night_stops_no_other(tmp_path: Path, content: str) -> None:
    """Seen red: with `read_manifest`, which raises, as of a run that one asked for."""
    make_night(tmp_path, "2026-11-09", content)
    broken = make_night(tmp_path, "2026-11-10")
    (broken / "audit").mkdir()
    (broken / "audit" / "summary.json").write_text("{")
    make_night(tmp_path, "2026-11-11")
    nights = read_nights(tmp_path / "2026-11-11")
    assert [night.manifest is None for night in nights] == [True, False, False]
    assert nights[1].audit is None


def test_nights_in_a_store(store: Store, bucket: str, tmp_path: Path) -> None:
    manifest = json.dumps(new_manifest({})).encode()
    for name, content in (("2026-11-09", manifest), ("2026-11-10", b"{"), ("2026-11-11", manifest)):
        store.put(bucket, f"jobs/a/{name}/run.json", content)
        store.put(bucket, f"jobs/a/{name}/data/part-0", b"x")
    store.put(bucket, "jobs/a/2026-11-09/report.html", b"page")
    store.put(bucket, "jobs/a/2026-11-09/audit/summary.json", b'{"verdict": "pass"}')
    store.put(bucket, "jobs/a/2026-11-08/notes.txt", b"no run")
    store.put(bucket, "jobs/b/2026-11-07/run.json", manifest)
    folder = RemoteFolder(Location(f"s3://{bucket}/jobs/a/2026-11-11", ObjectStoreSettings()))
    nights = read_remote_nights(folder)
    assert RemoteCopy(tmp_path, None, folder).nights() == nights
    assert [night.date for night in nights] == ["2026-11-09", "2026-11-10", "2026-11-11"]
    assert [night.has_page for night in nights] == [True, False, False]
    assert nights[0].audit == {"verdict": "pass"} and nights[1].manifest is None
    assert (
        read_remote_nights(RemoteFolder(Location(f"s3://{bucket}/jobs/a", ObjectStoreSettings())))
        == []
    )
    assert read_remote_nights(RemoteFolder(Location(f"s3://{bucket}", ObjectStoreSettings()))) == []


@pytest.mark.parametrize("method", ["names_inside", "read"])
def test_a_night_that_the_store_does_not_give_is_shown_without_its_figures(
    store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As where the rights of a night's folder are its own."""
    manifest = json.dumps(new_manifest({})).encode()
    for date in ("2026-11-09", "2026-11-10"):
        store.put(bucket, f"job/{date}/run.json", manifest)
    whole = getattr(RemoteFolder, method)

    def refuse(folder: RemoteFolder, *names: str) -> object:
        if folder.name == "2026-11-09":
            raise StorageError("access denied")
        return whole(folder, *names)

    monkeypatch.setattr(RemoteFolder, method, refuse)
    url = Location(f"s3://{bucket}/job/2026-11-10", ObjectStoreSettings())
    first, second = read_remote_nights(RemoteFolder(url))
    assert (first.date, first.manifest, second.date) == ("2026-11-09", None, "2026-11-10")
    assert second.manifest is not None


def test_a_store_that_lists_no_neighbours_gives_no_trend(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: RemoteFolder) -> list[str]:
        raise StorageError("access denied")

    monkeypatch.setattr(RemoteFolder, "names_beside", refuse)
    url = Location(f"s3://{bucket}/job/2026-11-10", ObjectStoreSettings())
    assert read_remote_nights(RemoteFolder(url)) == []
