"""Scores in a bucket, on a fleet, and as Prometheus sees them: those of a job here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.executor.fleet import Fleet
from pipeline.location import Location
from pipeline.run import run_job, write_report
from pipeline.settings import AuditSettings, JobSettings
from tests.asked_job import asked_settings, sheet_of, write_questions
from tests.asked_job import check_row as check_asked
from tests.asked_job import write_rows as write_asked
from tests.executor.thread_crew import ThreadCrew
from tests.job.test_metrics_export import parse
from tests.storage.buckets import Store
from tests.storage.conftest import bucket, store, store_server  # noqa: F401
from tests.test_scores import check_row, settings_of, write_rows
from tests.tiny_job import answers, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("elsewhere") / "model", sharpness=3.0)


def rows_in(store: Store, bucket: str) -> pl.DataFrame:  # noqa: F811
    parts = [store.get(bucket, key) for key in store.keys(bucket, "out/data/")]
    return pl.concat(pl.read_parquet(io.BytesIO(part)) for part in parts).sort("row_index")


def test_scores_are_written_to_a_bucket_and_resumed_there(
    model: Path,
    tmp_path: Path,
    store: Store,  # noqa: F811
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.test_scores import _Failing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_rows(tmp_path / "in.parquet", 12)
    asked = settings_of(model, choices_column="choices", rows_per_part=3, stall_timeout="never")

    def failing(settings: JobSettings) -> Engine:
        return _Failing(make_engine(settings))

    with pytest.raises(OSError, match="cut off"):
        run_job(str(source), f"s3://{bucket}/out", asked, make_engine=failing)
    assert 0 < len(rows_in(store, bucket)) < 12
    run_job(str(source), f"s3://{bucket}/out", asked)
    rows = rows_in(store, bucket)
    assert rows["row_index"].to_list() == list(range(12))
    for row in rows.iter_rows(named=True):
        check_row(model, row)
    run = Location(f"s3://{bucket}/out")
    assert audit_run(run, AuditSettings(audit_sample="100%", audit_arms=0)).passed
    assert "scored tokens" in write_report(run)["summary"]


def test_questions_are_asked_of_rows_in_a_bucket(
    model: Path,
    tmp_path: Path,
    store: Store,  # noqa: F811
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_questions(tmp_path / "q.yaml")
    store.put(bucket, "in/a.parquet", write_asked(tmp_path / "a.parquet").read_bytes())
    run_job(f"s3://{bucket}/in/", f"s3://{bucket}/out", asked_settings(model, tmp_path))
    for row in rows_in(store, bucket).iter_rows(named=True):
        check_asked(model, row, sheet_of(tmp_path / "q.yaml"))
    questions = json.loads(store.get(bucket, "out/run.json"))["questions"]
    assert [one["name"] for one in questions] == ["kind", "sure", "fine"]


def test_a_fleet_asks_questions_as_one_engine_does(model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.yaml")
    source = write_asked(tmp_path / "in.parquet", [f"text {i % 7}" for i in range(20)])

    def fleet(settings: JobSettings) -> Any:
        return Fleet(ThreadCrew(2, lambda worker: make_engine(settings)))

    asked = asked_settings(model, tmp_path, question_order="last")
    run_job(str(source), tmp_path / "out", asked, make_engine=fleet)
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * 20
    for row in rows.iter_rows(named=True):
        check_asked(model, row, sheet_of(tmp_path / "q.yaml"))


@pytest.mark.parametrize("what", ["choices", "questions"])
def test_prometheus_sees_what_is_scored(model: Path, tmp_path: Path, what: str) -> None:
    file = tmp_path / "m.prom"
    if what == "choices":
        source = write_rows(tmp_path / "in.parquet", 12)
        asked = settings_of(model, choices_column="choices", metrics_file=str(file))
    else:
        source = write_asked(tmp_path / "in.parquet")
        write_questions(tmp_path / "q.yaml")
        asked = asked_settings(model, tmp_path, metrics_file=str(file))
    run_job(str(source), tmp_path / "out", asked)
    rows, found = answers(tmp_path / "out"), parse(file.read_text())
    counts = rows["token_counts"].explode()
    assert found["coppice_scored_requests_total"] == len(counts)
    assert found["coppice_scored_tokens_total"] == counts.sum()
    assert found["coppice_generated_tokens_total"] == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["scored_requests"] == len(counts)
