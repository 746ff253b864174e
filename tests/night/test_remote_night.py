"""A night whose prompts and run directory are both below s3://."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import FolderInUse
from pipeline.night.night import sitting
from tests.night.job import DAY, NightlyJob
from tests.storage.buckets import Store


@pytest.fixture
def remote(
    store: Store, bucket: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> NightlyJob:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = NightlyJob(
        tmp_path, model_folder,
        input=f"s3://{bucket}/in/{{date}}/*.parquet", output=f"s3://{bucket}/nights",
    )  # fmt: skip
    job.give_input()
    (content,) = (tmp_path / "in").glob("*/*.parquet")
    store.put(bucket, f"in/{DAY}/p.parquet", content.read_bytes())
    return job


def test_it_is_published_once_as_any_other(remote: NightlyJob, store: Store, bucket: str) -> None:
    (ending,) = remote.sit()
    assert ending.state == "completed", ending.sentence()
    assert remote.days_published() == [DAY.isoformat()]
    assert f"nights/reviews/{DAY}/_SUCCESS" in store.keys(bucket)
    names = store.keys(bucket)
    (again,) = remote.sit()
    assert again == ending and store.keys(bucket) == names


def test_no_folder_of_its_own_disk_must_be_there_every_day(remote: NightlyJob) -> None:
    assert remote.night().awaited_folder is None


def test_one_process_of_this_machine_at_a_time_does_its_nights(remote: NightlyJob) -> None:
    night = remote.night()
    with sitting(night), pytest.raises(FolderInUse, match="an earlier night of reviews is still"):
        with sitting(night):
            pass
