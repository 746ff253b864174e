"""Nights that score: choices and questions, audited, published once, here and in a bucket."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest

from tests.asked_job import QUESTIONS, write_questions
from tests.night.job import DAY, NightlyJob
from tests.storage.buckets import Store
from tests.tiny_job import write_prompts


@pytest.fixture
def scoring(tmp_path: Path, model_folder: Path) -> NightlyJob:
    """With input for DAY, and nothing that says what is scored."""
    folder = tmp_path / "in" / DAY.isoformat()
    folder.mkdir(parents=True)
    texts: list[str | None] = ["a plum is soft", "stones are not", "a plum is soft"]
    write_prompts(folder / "p.parquet", texts, who=["me", "you", "me"], choices=[["y", "n"]] * 3)
    return NightlyJob(tmp_path, model_folder, max_new_tokens=None)


def test_a_night_of_choices_is_audited_and_published(scoring: NightlyJob) -> None:
    scoring.say(choices_column="choices")
    (ending,) = scoring.sit()
    assert ending.state == "completed", ending.sentence()
    rows = pl.read_parquet(scoring.published / "**" / "data" / "*.parquet")
    assert rows["choice"].is_in(["y", "n"]).all() and len(rows) == 3


def test_a_night_asks_the_questions_beside_its_file(
    scoring: NightlyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "q.yaml")
    scoring.say(questions="q.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (ending,) = scoring.sit()
    assert ending.state == "completed", ending.sentence()
    rows = pl.read_parquet(scoring.published / "**" / "data" / "*.parquet")
    assert rows["kind"].is_in(QUESTIONS[0]["labels"]).all() and rows["fine"].dtype == pl.Boolean
    (again,) = scoring.sit()
    assert again.state == "completed" and scoring.days_published() == [DAY.isoformat()]


def test_a_night_of_questions_below_s3_is_read_from_there(
    scoring: NightlyJob, store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_questions(tmp_path / "q.yaml")
    (content,) = (tmp_path / "in").glob("*/*.parquet")
    store.put(bucket, f"in/{DAY}/p.parquet", content.read_bytes())
    scoring.say(
        questions="q.yaml",
        input=f"s3://{bucket}/in/{{date}}/*.parquet",
        output=f"s3://{bucket}/nights",
        publish=f"s3://{bucket}/published",
    )
    (ending,) = scoring.sit()
    assert ending.state == "completed", ending.sentence()
    parts = [key for key in store.keys(bucket, "nights/") if "/data/" in key]
    rows = pl.concat(pl.read_parquet(io.BytesIO(store.get(bucket, key))) for key in parts)
    assert sorted(rows["row_index"]) == [0, 1, 2] and rows["sure"].is_between(1, 5).all()
    assert any(key.startswith("published/") and key.endswith(".parquet")
               for key in store.keys(bucket))  # fmt: skip
