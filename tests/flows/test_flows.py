"""The flows on a temporary server: results, retries, failures, and what Prefect gets to know."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import polars as pl
import pytest
from prefect.artifacts import Artifact
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.artifacts import _address
from flows.audit import audit
from flows.credentials import S3Credentials
from flows.generate import generate
from flows.nightly import nightly
from flows.parameters import JobForm
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import AuditFailed, EngineError, InputError, UsageError
from pipeline.job.outcome import RunOutcome
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.store_settings import ObjectStoreSettings
from tests.tiny_job import echo_settings, write_prompts, write_tokenizer

# Prefect makes forms of the dicts that it is given.
flow_audit: Any = audit
flow_generate: Any = generate
CANARY = "canary 7461 sings"
pytestmark = [
    pytest.mark.usefixtures("prefect_harness"),
    # Prefect's client leaves a socket to the garbage collector now and then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


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
    counters = flow_generate(*job)
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
        flow_generate(*job)
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
    """Seen red: with the parameter accepted; refused, but only after Prefect had stored it."""
    input, output, settings = job
    with pytest.raises(ParameterTypeError, match="YAML file") as refused:
        flow_generate(input, output, settings | {"system-prompt": "said aloud"})
    assert "said aloud" not in str(refused.value) and b"said aloud" not in stored()
    word = "a system word for none but the job"
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    (tmp_path / "job.yaml").write_text(
        f"system-prompt: {word}\napply-chat-template: true\nchat-template: {template}\n"
    )
    flow_generate(input, output, settings | {"config": str(tmp_path / "job.yaml")})
    texts = pl.read_parquet(Path(output) / "data" / "*.parquet")["generated_text"]
    assert any(word[::-1][:5] in text for text in texts)
    assert word.encode() not in stored()


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
    assert flow_generate(*job)["rows_ok"] == 2
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
        flow_generate(*job)
    assert len(calls) == 1


def test_a_failed_audit_fails_the_flow_and_is_reported(
    job: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed:
        def check(self, run: object) -> None:
            raise AuditFailed(f"the audit of {run} failed: one row is corrupt")

    reported: list[str] = []
    monkeypatch.setattr("flows.audit.audit_run", lambda *arguments: Failed())

    def write_report(run: Location) -> dict[str, str]:
        reported.append(str(run))
        return {"page": f"{run}/report.html", "summary": "| rows | 2 |"}

    monkeypatch.setattr("flows.audit.write_report", write_report)
    run_job(job[0], Path(job[1]), echo_settings(Path(job[2]["model"])))
    with pytest.raises(AuditFailed, match="one row is corrupt"):
        flow_audit(job[1], {})
    assert reported == [job[1]]
    shown = str(Artifact.get("night-summary"))
    assert "| rows | 2 |" in shown and f"`{job[1]}/report.html` on " in shown


def test_a_passed_audit_is_the_flows_result_and_reported(
    job: tuple[str, str, dict[str, Any]], model_folder: Path
) -> None:
    flat = {"model": str(model_folder), "engine": "naive", "max_new_tokens": 2}
    run_job(job[0], Path(job[1]), JobSettings.from_flat(flat))
    found = flow_audit(job[1], {"audit-arms": 0, "audit-sample": "100%"})
    assert found == {"verdict": "pass", "rows_audited": 2}
    assert (Path(job[1]) / "report.html").exists()


def test_a_job_without_a_model_says_where_to_name_one(
    job: tuple[str, str, dict[str, Any]],
) -> None:
    with pytest.raises(UsageError, match="^no model is named; fill in model, or name it in the"):
        flow_generate(job[0], job[1], {"engine": "echo"})
    assert not Path(job[1]).exists()


def test_prefect_is_told_not_to_track() -> None:
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


SECRETS = {"access_key_id": "CANARY-ID", "secret_access_key": "CANARY-KEY"}


@pytest.mark.fault(
    "canary strings",
    injected="keys of a store in a Prefect flow: as parameters; in a block of credentials",
    outcome="refused before they are stored; used, and neither in the database nor in a log",
)
def test_secrets_are_in_a_block_and_nowhere_else(
    job: tuple[str, str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen red: as parameters they were refused, but only after Prefect had stored them; and
    Prefect's own check logged what it refused.
    """
    input, output, settings = job
    for options in (SECRETS, {"aws_secret_access_key": "CANARY-KEY"}):
        with pytest.raises(ParameterTypeError, match="name a block") as refused:
            flow_generate(input, output, settings | {"storage-options": options})
        assert "CANARY" not in str(refused.value)
    secrets: dict[str, Any] = dict(SECRETS)
    block = S3Credentials(**secrets, region="eu-west-1", endpoint_url="http://127.0.0.1:9")
    block.save("mine", overwrite=True)
    used: list[JobSettings] = []

    def run(input: str, output: str, settings: JobSettings, observer: object) -> RunOutcome:
        used.append(settings)
        raise InputError(f"no rows in {settings.store!r}")

    monkeypatch.setattr("flows.generate.run_job", run)
    with pytest.raises(InputError):
        flow_generate(input, output, settings | {"storage_options": {"region": "x"}}, "mine")
    assert used[0].store.storage_options == SECRETS | {
        "region": "eu-west-1", "endpoint_url": "http://127.0.0.1:9",
    }  # fmt: skip
    known = stored() + "".join(capfd.readouterr()).encode()
    assert b"coppice-s3-credentials" in known and b"CANARY" not in known
    assert "CANARY" not in caplog.text
    with pytest.raises(UsageError, match="has no block coppice-s3-credentials/other"):
        flow_generate(input, output, settings, "other")
    gc.collect()  # a connection that block.save left open, while its warning is let pass


def test_the_form_has_every_setting_but_text_and_secrets() -> None:
    """What the UI shows: names, types, choices and defaults, all of them optional."""
    schema = parameter_schema(generate).model_dump()
    form = schema["definitions"]["JobForm"]
    sections = [info.annotation for info in JobSettings.model_fields.values()]
    names = {name for section in sections for name in section.model_fields}  # type: ignore[union-attr]
    assert set(form["properties"]) == names - {"system_prompt"} | {"config"}
    assert form["additionalProperties"] is False and "required" not in form
    dtype = form["properties"]["dtype"]
    assert dtype["anyOf"][0]["enum"] == ["auto", "float32", "bfloat16"]
    assert dtype["description"].endswith("Default: auto.")
    options = schema["definitions"]["StorageOptions"]["properties"]
    assert set(options) == {"endpoint_url", "region", "anonymous"}
    assert set(parameter_schema(nightly).model_dump()["properties"]) == {
        "file", "timezone", "date", "credentials",
    }  # fmt: skip


def test_a_form_counts_over_its_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("max-rows: 8\nkv-budget: 1GiB\ndtype: float32\n")
    form = JobForm.model_validate({"config": file, "max-rows": 3, "time_budget": 60})
    assert form.flat() == {
        "max_rows": 3, "kv_budget": "1GiB", "dtype": "float32", "time_budget": "60",
    }  # fmt: skip
    with pytest.raises(ValidationError, match="max_row"):
        JobForm.model_validate({"max_row": 3})


@pytest.mark.parametrize(
    ("page", "endpoint", "link"),
    [
        ("/out/a b/report.html", None, None),
        ("s3://b/out/a b/report.html", "http://minio:9000", "http://minio:9000/b/out/a%20b/report.html"),
        ("s3://b/out/report.html", None,
         "https://console.aws.amazon.com/s3/object/b?prefix=out/report.html"),
        ("gs://b/out/report.html", None,
         "https://console.cloud.google.com/storage/browser/_details/b/out/report.html"),
        ("az://b/out/report.html", None, None),
    ],
)  # fmt: skip
def test_a_link_is_one_that_a_browser_opens(
    page: str, endpoint: str | None, link: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: file:///..., which no browser opens from a site."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    options = {} if endpoint is None else {"endpoint_url": endpoint}
    run = Location(page.removesuffix("/report.html"), ObjectStoreSettings(storage_options=options))
    assert _address(run, page) == link
