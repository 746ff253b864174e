"""prefect.yaml on a real server, from a folder that holds a person's own pipeline.py and flows/."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.flows.real_server import ROOT, PrefectServer, Process
from tests.night.job import DAY, NightlyJob
from tests.tiny_job import write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FLOWS = ("nightly", "generate", "audit")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """Whoever talks to it does so in a folder in which the names of our packages are taken."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    (server.folder / "pipeline.py").write_text("raise SystemExit('this is their pipeline')\n")
    (server.folder / "flows").mkdir()
    (server.folder / "flows" / "__init__.py").write_text("raise SystemExit('their flows')\n")
    server.start()
    yield server
    server.stop_all()


@pytest.fixture(scope="module")
def deployed(server: PrefectServer) -> dict[str, dict[str, Any]]:
    """All flows of prefect.yaml, by name."""
    pool = server.run("prefect", "work-pool", "create", "nights", "--type", "process")
    assert pool.wait() == 0, pool.log
    shutil.copy(ROOT / "prefect.yaml", server.folder)
    made = server.run("prefect", "--no-prompt", "deploy", "--all")
    assert made.wait() == 0, made.log
    found = (server._ask("GET", f"deployments/name/coppice-{name}/{name}") for name in FLOWS)
    return {name: answer.json() for name, answer in zip(FLOWS, found, strict=True)}


def create(server: PrefectServer, deployment: dict[str, Any], **parameters: Any) -> Any:
    """As the UI does it, with what a person filled in."""
    return server._ask(
        "POST", f"deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters}
    )


def execute(server: PrefectServer, run: str) -> Process:
    """As a worker does it."""
    return server.run("prefect", "flow-run", "execute", run)


def test_all_flows_are_deployed_with_tags_and_forms(deployed: dict[str, dict[str, Any]]) -> None:
    """Seen red: nightly alone, and `settings` was any object."""
    for name, deployment in deployed.items():
        assert deployment["entrypoint"] == f"kvcoppice.flows.{name}"
        assert deployment["tags"] == ["coppice", name]
    (schedule,) = deployed["nightly"]["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert schedule["schedule"]["timezone"] == "Europe/Berlin"
    form = deployed["generate"]["parameter_openapi_schema"]["definitions"]["JobForm"]
    assert {"model", "max_new_tokens", "dtype"} <= set(form["properties"])


def test_what_does_not_fit_the_form_never_reaches_the_database(
    server: PrefectServer, deployed: dict[str, dict[str, Any]]
) -> None:
    given = {"input": "p.parquet", "output": "out"}
    for wrong in (
        {"model": "m", "max_new_tokens": "CANARY-9"},
        {"model": "m", "modle": "CANARY-9"},
        {"model": "m", "system_prompt": "CANARY-9"},
        {"model": "m", "storage_options": {"secret_access_key": "CANARY-9"}},
    ):
        answer = create(server, deployed["generate"], **given, settings=wrong)
        assert answer.status_code in (409, 422), answer.text
    known = b"".join(path.read_bytes() for path in server.database.parent.glob("prefect.db*"))
    assert b"coppice-generate" in known and b"CANARY-9" not in known


def test_generate_runs_as_a_worker_runs_it(
    server: PrefectServer,
    deployed: dict[str, dict[str, Any]],
    tmp_path: Path,
    tokenizer_folder: Path,
) -> None:
    """Seen red: their flows were loaded in the place of ours."""
    prompts = write_prompts(tmp_path / "p.parquet", ["why?", "who?"])
    settings = {"model": str(tokenizer_folder), "engine": "echo", "max_new_tokens": 9}
    answer = create(
        server, deployed["generate"], input=str(prompts), output=str(tmp_path / "out"),
        settings=settings,
    )  # fmt: skip
    assert answer.is_success, answer.text
    done = execute(server, answer.json()["id"])
    assert done.wait() == 0, done.log
    assert server.ended(answer.json()["id"])["name"] == "Completed", done.log
    texts = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")["generated_text"]
    assert sorted(texts.to_list()) == ["?ohw", "?yhw"]


def test_a_night_is_served_beside_their_modules(
    server: PrefectServer, tmp_path: Path, model_folder: Path
) -> None:
    job = NightlyJob(tmp_path, model_folder, audit_arms=0)
    job.give_input()
    process = server.serve(job.file, "reviews")
    run = server.begin("reviews", date=DAY.isoformat())
    assert server.ended(run)["name"] == "Completed", process.log
    assert job.days_published() == [DAY.isoformat()]


def test_the_block_of_credentials_is_registered(server: PrefectServer) -> None:
    made = server.run("prefect", "block", "register", "-m", "kvcoppice.flows")
    assert made.wait() == 0, made.log
    slug = {"slug": {"any_": ["coppice-s3-credentials"]}}
    (kind,) = server.post("block_types/filter", block_types=slug)
    assert kind["name"] == "Coppice S3 credentials"
