"""The flows on a temporary server: results, retries, failures, and what Prefect gets to know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import polars as pl
import pytest

from flows.__main__ import _settings
from flows.audit import audit
from flows.generate import generate
from pipeline import run as run_module
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import AuditFailed, EngineError, InputError, UsageError
from pipeline.run import run_job
from tests.tiny_job import echo_settings, write_prompts, write_tokenizer

CANARY = "canary 7461 sings"


@pytest.fixture
def job(tmp_path: Path) -> tuple[str, str, dict[str, Any]]:
    prompts = write_prompts(tmp_path / "p.parquet", [CANARY, "hello"])
    model = write_tokenizer(tmp_path / "model")
    settings = {"model": str(model), "engine": "echo", "max-new-tokens": 40}
    return str(prompts), str(tmp_path / "out"), settings


def test_the_flow_does_the_job_and_tells_prefect_no_text(
    job: tuple[str, str, dict[str, Any]],
) -> None:
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    counters = generate(*job)
    assert counters["rows_ok"] == 2
    texts = pl.read_parquet(Path(job[1]) / "data" / "*.parquet")["generated_text"]
    assert CANARY[::-1] in texts.to_list()
    database = Path(urlparse(PREFECT_API_DATABASE_CONNECTION_URL.value()).path)
    files = [file for file in database.parent.iterdir() if file.name.startswith(database.name)]
    stored = b"".join(file.read_bytes() for file in files)
    assert b"coppice-generate" in stored
    assert CANARY.encode() not in stored and CANARY[::-1].encode() not in stored


def test_a_retry_goes_on_where_the_first_try_stopped(
    job: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def make_engine(settings: object) -> EchoEngine:
        tries.append(1)
        if len(tries) == 1:
            raise EngineError("the device fell over")
        return EchoEngine()

    monkeypatch.setattr(run_module, "make_engine", make_engine)
    assert generate(*job)["rows_ok"] == 2
    assert len(tries) == 2


def test_a_wrong_call_is_not_tried_twice(
    job: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(*arguments: object) -> None:
        calls.append(1)
        raise InputError("there is no such file")

    monkeypatch.setattr("flows.generate.run_job", refuse)
    with pytest.raises(InputError):
        generate(*job)
    assert len(calls) == 1


def test_a_failed_audit_fails_the_flow_and_is_reported(
    job: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed:
        passed = False
        reasons = ("one row is corrupt",)

    reported: list[str] = []
    monkeypatch.setattr("flows.audit.audit_run", lambda *arguments: Failed())
    monkeypatch.setattr("flows.audit.report_run", lambda path, store: reported.append(path) or path)
    run_job(job[0], Path(job[1]), echo_settings(Path(job[2]["model"])))
    with pytest.raises(AuditFailed, match="one row is corrupt"):
        audit(job[1], {})
    assert reported == [job[1]]


def test_prefect_is_told_not_to_track() -> None:
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_secrets_are_refused_where_prefect_would_keep_them(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        "storage-options: {region: x, access_key_id: CANARY, secret_access_key: CANARY}"
    )
    with pytest.raises(UsageError, match="set AWS_ACCESS_KEY_ID") as error:
        _settings(config)
    assert "CANARY" not in str(error.value)
    config.write_text("storage-options: {region: x}")
    assert _settings(config) == {"storage-options": {"region": "x"}}
