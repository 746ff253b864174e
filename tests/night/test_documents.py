"""Nights whose rows reuse documents: audited and published once, here and in a bucket."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest

from tests.job.test_documents import DOCUMENTS, ROWS, write_rows
from tests.night.job import DAY, NightlyJob
from tests.storage.buckets import Store


@pytest.fixture
def reusing(tmp_path: Path, model_folder: Path) -> NightlyJob:
    """With input for DAY; each document is encoded once."""
    folder = tmp_path / "in" / DAY.isoformat()
    folder.mkdir(parents=True)
    write_rows(folder / "p.parquet")
    return NightlyJob(
        tmp_path, model_folder, engine="prefix", reuse="concat", calibration_rows=4,
        on_disagreement="warn",
    )  # fmt: skip


def check(rows: pl.DataFrame) -> None:
    assert rows["row_index"].sort().to_list() == list(range(len(ROWS)))
    assert rows["reuse_mode"].unique().to_list() == ["concat"]
    assert rows["documents"].to_list() == [len(documents) for _, documents, _ in ROWS]
    assert rows["document_tokens"].max() == sum(map(len, DOCUMENTS[:3]))


def test_a_night_of_documents_is_audited_and_published(reusing: NightlyJob) -> None:
    (ending,) = reusing.sit()
    assert ending.state == "completed", ending.sentence()
    check(pl.read_parquet(reusing.published / "**" / "data" / "*.parquet").sort("row_index"))
    page = (reusing.run_directory() / "report.md").read_text()
    assert "**Documents** (`--reuse concat`)" in page and "**Audit passed**" in page
    (again,) = reusing.sit()
    assert again.state == "completed" and reusing.days_published() == [DAY.isoformat()]


def test_a_night_of_documents_below_s3_is_read_published_and_kept_there(
    reusing: NightlyJob, store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (content,) = (tmp_path / "in").glob("*/*.parquet")
    store.put(bucket, f"in/{DAY}/p.parquet", content.read_bytes())
    reusing.say(
        input=f"s3://{bucket}/in/{{date}}/*.parquet",
        output=f"s3://{bucket}/nights",
        publish=f"s3://{bucket}/published",
    )
    (ending,) = reusing.sit()
    assert ending.state == "completed", ending.sentence()
    for place in ("nights/", "published/"):
        parts = [key for key in store.keys(bucket, place) if key.endswith(".parquet")]
        read = [pl.read_parquet(io.BytesIO(store.get(bucket, k))) for k in parts if "/data/" in k]
        check(pl.concat(read).sort("row_index"))
