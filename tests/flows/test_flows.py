"""The flows on a temporary server: results, retries, failures, and what Prefect gets to know."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import polars as pl
import pytest

from flows.audit import audit
from flows.generate import generate
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import AuditFailed, EngineError, InputError, UsageError
from pipeline.run import run_job
from pipeline.terminal.kept_settings import read_kept, whole_settings
from tests.tiny_job import echo_settings, write_prompts, write_tokenizer

CANARY = "canary 7461 sings"
pytestmark = pytest.mark.usefixtures("prefect_harness")


@pytest.fixture
def job(tmp_path: Path) -> tuple[str, str, dict[str, Any]]:
    prompts = write_prompts(tmp_path / "p.parquet", [CANARY, "hello"])
    model = write_tokenizer(tmp_path / "model")
    settings = {"model": str(model), "engine": "echo", "max-new-tokens": 40}
    return str(prompts), str(tmp_path / "out"), settings


def stored() -> bytes:
    """All that Prefect has written: its database with the logs, parameters and states in it."""
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    APILogHandler().flush()  # log lines are sent in the background
    database = Path(urlparse(PREFECT_API_DATABASE_CONNECTION_URL.value()).path)
    files = [file for file in database.parent.iterdir() if file.name.startswith(database.name)]
    return b"".join(file.read_bytes() for file in files)


@pytest.mark.fault(
    "canary strings",
    injected="a Prefect flow: a unique word in prompts and answers",
    outcome="not in Prefect's database, nor in its logs",
)
def test_the_flow_does_the_job_and_tells_prefect_no_text(
    job: tuple[str, str, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Seen red: a flow that logged its first prompt."""
    counters = generate(*job)
    assert counters["rows_ok"] == 2
    texts = pl.read_parquet(Path(job[1]) / "data" / "*.parquet")["generated_text"]
    assert CANARY[::-1] in texts.to_list()
    database = stored()
    assert b"coppice-generate" in database and b"2 rows, 22 prompt tokens" in database
    known = database + "".join(capfd.readouterr()).encode()
    assert CANARY.encode() not in known and CANARY[::-1].encode() not in known


@pytest.mark.fault(
    "canary strings",
    injected="a Prefect flow that crashes: an unexpected error that quotes a prompt, one of ours "
    "that it caused",
    outcome="type and place in Prefect's database and logs, no message",
)
@pytest.mark.parametrize("is_ours", [False, True])
def test_a_flow_that_crashes_tells_prefect_no_text(
    job: tuple[str, str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_ours: bool,
) -> None:
    """Seen red: without `without_text`."""

    def crash(*arguments: object) -> None:
        try:
            raise RuntimeError(f"the prompt was {CANARY}")
        except RuntimeError as error:
            if is_ours:
                raise EngineError("the device fell over") from error
            raise

    monkeypatch.setattr("flows.generate.run_job", crash)
    with pytest.raises(EngineError) as failed:
        generate(*job)
    known = stored() + "".join(capfd.readouterr()).encode() + str(failed.value).encode()
    expected = b"the device fell over" if is_ours else b"unexpected RuntimeError in test_flows.py"
    assert expected in known and CANARY.encode() not in known


@pytest.mark.fault(
    "canary strings",
    injected="a system prompt in a Prefect flow: as a parameter; in the YAML file of `config`",
    outcome="refused; used, and not in Prefect's database",
)
def test_a_system_prompt_belongs_into_the_file(
    job: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    """Seen red: with the parameter accepted."""
    input, output, settings = job
    with pytest.raises(UsageError, match="YAML file"):
        generate(input, output, settings | {"system-prompt": "said aloud"})
    word = "a system word for none but the job"
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    (tmp_path / "job.yaml").write_text(
        f"system-prompt: {word}\napply-chat-template: true\nchat-template: {template}\n"
    )
    generate(input, output, settings | {"config": str(tmp_path / "job.yaml")})
    texts = pl.read_parquet(Path(output) / "data" / "*.parquet")["generated_text"]
    assert any(word[::-1][:5] in text for text in texts)
    assert word.encode() not in stored()
    assert whole_settings({"max-rows": 3}) == {"max_rows": 3}


def test_a_retry_goes_on_where_the_first_try_stopped(
    job: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def make_engine(settings: object) -> EchoEngine:
        tries.append(1)
        if len(tries) == 1:
            raise EngineError("the device fell over")
        return EchoEngine()

    monkeypatch.setattr("flows.generate.run_job", partial(run_job, make_engine=make_engine))
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
        read_kept(config)
    assert "CANARY" not in str(error.value)
    config.write_text("storage-options: {region: x}")
    assert read_kept(config) == {"storage-options": {"region": "x"}}
