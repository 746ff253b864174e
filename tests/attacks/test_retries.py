"""A retry of a run that somebody has damaged or forged, and what is judged and published of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import RunDirectoryError, StorageError
from pipeline.location import Location
from pipeline.model.model import load_model
from pipeline.night.publication import publish_run
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing
from pipeline.run import retry_job, run_job
from pipeline.settings import AuditSettings, JobSettings
from pipeline.status import read_status
from tests.job.test_retrying import Picky
from tests.tiny_job import answers, echo_settings, on, write_prompts

NIGHT = datetime.date(2026, 11, 2)


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Location:
    source = write_prompts(tmp_path / "p.parquet", ["a", "b", "c", "d", None])
    settings = echo_settings(tokenizer_folder, rows_per_part=2, fail_on_error="100%")
    run_job(str(source), tmp_path / "out", settings, make_engine=on(Picky(1, 2)))
    return Location(str(tmp_path / "out"))


def retry(run: Location, *failing: int) -> None:
    retry_job(run, {}, make_engine=on(Picky(*failing)))


def test_a_record_that_is_damaged_is_named_and_nothing_is_touched(run: Location) -> None:
    (run.local / "retried.parquet").write_bytes(b"PAR1 not")
    before = answers(run.local)
    with pytest.raises(RunDirectoryError, match="retried.parquet is damaged"):
        retry(run)
    assert answers(run.local).equals(before)
    assert read_status(run)["status"] == "complete"


def test_a_record_of_rows_that_were_answered_takes_none_of_them_away(run: Location) -> None:
    forged = {"id": ["r0", "x"], "row_index": [0, 99], "attempts": [1, 1]}
    pl.DataFrame(
        forged | {"error_type": ["x"] * 2, "error_message": ["x"] * 2},
        schema_overrides={"attempts": pl.Int8},
    ).write_parquet(run.local / "retried.parquet")
    before = answers(run.local)
    retry(run)
    after = answers(run.local)
    was_ok = before["status"] == "ok"
    assert after.filter(was_ok).equals(before.filter(was_ok))
    assert after["status"].to_list() == ["ok"] * 4 + ["error"]


def test_a_part_that_was_altered_is_named(run: Location) -> None:
    part = sorted((run.local / "data").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="altered after it was written"):
        retry(run)
    assert (run.local / "_SUCCESS").exists()


def test_a_hidden_file_that_only_looks_like_a_part_aside_is_left_alone(run: Location) -> None:
    stranger = run.local / "data" / ".notes.parquet.aside"
    stranger.write_text("mine")
    retry(run)
    assert stranger.read_text() == "mine"


@pytest.mark.parametrize("setting", ["model", "input"])
def test_a_retry_of_another_input_or_model_is_refused(
    run: Location, tmp_path: Path, setting: str
) -> None:
    if setting == "input":
        write_prompts(tmp_path / "p.parquet", ["a", "b", "c", "e", None])
        with pytest.raises(RunDirectoryError, match="another input"):
            retry(run)
    else:
        manifest = json.loads((run.local / "run.json").read_text())
        manifest["fingerprint"]["model"] = "0" * 64
        (run.local / "run.json").write_text(json.dumps(manifest))
        with pytest.raises(RunDirectoryError, match="another model"):
            retry(run)
    assert read_status(run)["status"] == "complete"


class Spoilt(PrefixEngine):
    """The real one, which says of some rows that there was no room for them."""

    failing: tuple[int, ...] = ()

    def _completions(self, plan: Plan, *others: Any) -> Iterator[Completion]:
        for done in super()._completions(plan, *others):
            failed = Completion(done.sequence, (), "error", 0, Timing(), "OutOfMemory", "no room")
            yield failed if int(plan.sequences.row[done.sequence]) in self.failing else done


def test_a_retried_run_is_audited_anew_and_published_in_place_of_what_it_was(
    tmp_path: Path, model_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [f"hello world {c}" for c in "abcdef"])
    flat = {"dtype": "float32", "max_new_tokens": 4, "rows_per_part": 2, "fail_on_error": "100%"}
    settings = JobSettings.from_flat({"model": str(model_folder), **flat})
    run, target = Location(str(tmp_path / "out")), Location(str(tmp_path / "published"))
    fails: list[tuple[int, ...]] = [(1, 4), ()]

    def make(settings: JobSettings) -> PrefixEngine:
        engine = Spoilt(load_model(settings.model), settings.engine)
        engine.failing = fails.pop(0)
        return engine

    bar = AuditSettings(audit_sample="100%", audit_arms=0)
    run_job(str(source), run.path, settings, make_engine=make)
    assert audit_run(run, bar).rows_audited == 4
    assert publish_run(run, target, "job", NIGHT).is_new
    retry_job(run, {}, make_engine=make)
    with pytest.raises(RunDirectoryError, match="was not audited"):
        publish_run(run, target, "job", NIGHT)
    verdict = audit_run(run, bar)
    assert verdict.passed and verdict.rows_audited == 6
    assert publish_run(run, target, "job", NIGHT).is_new
    shown = pl.read_parquet(tmp_path / "published" / "2026-11-02" / "data" / "*.parquet")
    assert sorted(shown["id"].to_list()) == [f"r{i}" for i in range(6)]
    assert shown["status"].to_list() == ["ok"] * 6
