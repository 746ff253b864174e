"""Nights on a real Prefect server, in processes of their own, and what happens to both."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.schedule import check_server, serve
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import UsageError
from pipeline.run import run_job
from tests.flows.real_server import ROOT, PrefectServer, Process, wait_for
from tests.flows.receiver import Receiver
from tests.night.job import DAY, NightlyJob
from tests.tiny_job import on

pytestmark = pytest.mark.timeout(600)  # three processes a test, and the machine may have one core
CANARY = "canary 5119 dives"
_SLOW = {"max_rows": 1, "rows_per_part": 2, "max_new_tokens": 60, "ignore_eos": True}
MakeJob = Callable[..., NightlyJob]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.stop_all()


@pytest.fixture(scope="module")
def served(server: PrefectServer, model_folder: Path) -> Process:
    """The deployment `any`, which does whatever file its runs name."""
    folder = server.folder / "any"
    folder.mkdir()
    return server.serve(NightlyJob(folder, model_folder).file, "any")


@pytest.fixture
def make_job(tmp_path: Path, model_folder: Path) -> MakeJob:
    def make(name: str = "reviews", rows: int = 4, **keys: Any) -> NightlyJob:
        folder = tmp_path / name
        folder.mkdir()
        job = NightlyJob(folder, model_folder, name=name, audit_arms=0, **keys)
        job.give_input(prompts=[f"{CANARY} {number}" for number in range(rows)])
        return job

    return make


def begin(server: PrefectServer, job: NightlyJob) -> str:
    return server.begin("any", file=str(job.file), date=DAY.isoformat())


def parts(job: NightlyJob) -> set[str]:
    return {path.name for path in job.run_directory().glob("data/*.parquet")}


def begin_slow(server: PrefectServer, job: NightlyJob, log: Process) -> str:
    """A night that has committed some parts, and has seconds to go."""
    run = begin(server, job)
    wait_for(lambda: len(parts(job)) > 3, "parts", log)
    return run


def test_the_schedule_fires_and_the_night_is_published_and_shown(
    server: PrefectServer, make_job: MakeJob
) -> None:
    """The cron expression has a sixth field, of seconds: it saves some of a minute's waiting, and
    two nights a minute are few enough that hardly one begins beside the first.

    Seen red: with a flow that logged its first prompt.
    """
    job = make_job("stars", input="in/*/*.parquet")
    process = server.serve(job.file, "stars", cron="* * * * * */30")
    deployment = server.deployment("stars")
    assert deployment is not None
    assert deployment["parameters"] == {"file": str(job.file), "timezone": "UTC"}

    def fired() -> list[dict[str, Any]]:
        wanted = {"deployment_id": {"any_": [deployment["id"]]}}
        found = server.post("flow_runs/filter", flow_runs=wanted, sort="EXPECTED_START_TIME_ASC")
        return [run for run in found if run["state_name"] == "Completed"]

    wait_for(fired, "a scheduled night", process)
    run = fired()[0]
    day = run["expected_start_time"][:10]
    assert (run["auto_scheduled"], run["name"]) == (True, f"stars {day}")
    assert job.days_published() == [day]
    assert "Completed: 4 rows" in run["state"]["message"]

    shown = server.artifacts(run["id"])
    assert shown["night-progress"] == 100
    (row,) = json.loads(shown["night-parts"])
    assert (row["rows answered"], row["rows failed"]) == (4, 0)
    assert "rows answered | 4 of 4" in shown["night-summary"]
    page = Path(job.folder / "nights" / "stars" / day / "report.html")
    assert page.exists() and f"The whole report: `{page}` on " in shown["night-summary"]
    assert "night-report" not in shown  # a browser opens no file from a site
    assert {"coppice", "nightly"} <= set(run["tags"])
    assert process.end(signal.SIGTERM, whole_group=False) == 0
    # No text in all that Prefect has; and the schedule goes on without us.
    known = b"".join(path.read_bytes() for path in server.database.parent.glob("prefect.db*"))
    assert b"stars" in known and CANARY.encode() not in known and CANARY not in process.log
    assert not server.deployment("stars")["paused"]  # type: ignore[index]


@pytest.fixture(scope="module")
def receiver(server: PrefectServer) -> Iterator[Receiver]:
    """Who is told by the automations as we ship them; a second set of them calls a dead port."""
    receiver, dead = Receiver(), Receiver()
    dead.close()
    for name, url in (("told", receiver.url), ("dead", dead.url)):
        block = tell(server, name, url)
        shipped = (ROOT / "flows" / "automations.yaml").read_text()
        file = server.folder / f"{name}.yaml"
        file.write_text(shipped.replace("BLOCK_ID", block))
        made = server.run("prefect", "automation", "create", "--from-file", str(file))
        assert made.wait() == 0 and "Created 5 automation(s)" in made.log, made.log
    yield receiver
    receiver.close()


def told(receiver: Receiver, state: str, night: str) -> list[dict[str, Any]]:
    """What was said of this state of a night."""
    return [post for post in receiver.posts if (post["state"], post["night"]) == (state, night)]


def tell(server: PrefectServer, name: str, url: str) -> str:
    """Save a webhook block; returns its id."""
    (kind,) = server.post("block_types/filter", block_types={"slug": {"any_": ["webhook"]}})
    schemas = {"block_type_id": {"any_": [kind["id"]]}}
    schema = server.post("block_schemas/filter", block_schemas=schemas)[0]
    document = server.post(
        "block_documents/",
        name=name,
        data={"url": url, "headers": {"Content-Type": "application/json"}},
        block_type_id=kind["id"],
        block_schema_id=schema["id"],
    )
    return str(document["id"])


@pytest.mark.fault(
    "audit failed",
    injected="a scheduled night whose answers are wrong; the webhook that is told is down",
    outcome="the flow fails, nothing is published, the other webhook is told and gets no text",
)
def test_a_failed_audit_publishes_nothing_and_somebody_is_told(
    server: PrefectServer, served: Process, make_job: MakeJob, receiver: Receiver
) -> None:
    job = make_job("wrong")
    night = job.night()
    run_job(night.input, night.run.path, night.job, make_engine=on(EchoEngine()))
    for _ in range(3):  # on SQLite a busy server loses an event now and then, see docs/nights.md
        state = server.ended(run := begin(server, job))
        assert (state["type"], state["name"]) == ("FAILED", "Failed")
        assert "the audit of" in state["message"]
        with suppress(AssertionError):
            wait_for(lambda: told(receiver, "Failed", f"wrong {DAY}"), "the webhook", None, 40)
            break
    assert not job.published.exists() or not job.days_published()
    assert "night-summary" in server.artifacts(run)

    said = told(receiver, "Failed", f"wrong {DAY}")[0]
    assert said["flow"] == "coppice-nightly" and said["message"] == state["message"]
    assert CANARY not in json.dumps(said)
    assert server.flow_run(run)["state"]["id"] == state["id"]


@pytest.mark.fault(
    "SIGKILL",
    injected="kill -9 of a night's own process while it generates",
    outcome="the run is Crashed; the next one answers the rows that are left, and no other",
)
def test_a_night_that_is_killed_is_resumed_by_the_next(
    server: PrefectServer, served: Process, make_job: MakeJob
) -> None:
    job = make_job("killed", rows=20, **_SLOW)
    run = begin_slow(server, job, served)
    kept = parts(job)
    (night,) = nights_of(served)
    night.kill()
    assert server.ended(run)["type"] == "CRASHED"
    assert server.ended(begin(server, job))["name"] == "Completed"
    assert kept <= parts(job) and job.days_published() == [DAY.isoformat()]
    assert "20 rows (" in served.log and "done before)" in served.log


def nights_of(served: Process) -> list[psutil.Process]:
    """The processes in which nights run."""
    children = psutil.Process(served.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.fault(
    "night still going",
    injected="a second run of the deployment while a night runs",
    outcome="its state is Cancelled, named EarlierNightStillRunning; the first one goes on",
)
def test_a_night_that_would_overlap_is_cancelled(
    server: PrefectServer, served: Process, make_job: MakeJob
) -> None:
    """Seen red: with a runner that starts one process at a time, the second night was only late."""
    job = make_job("first", rows=400, **_SLOW)
    run = begin_slow(server, job, served)
    state = server.ended(begin(server, job))
    assert (state["type"], state["name"]) == ("CANCELLED", "EarlierNightStillRunning")
    assert "an earlier night of first is still going" in state["message"]
    assert server.flow_run(run)["state_type"] == "RUNNING"
    for night in nights_of(served):
        night.kill()
    server.ended(run)


@pytest.mark.slow
def test_two_jobs_on_one_device_queue_for_it(
    server: PrefectServer, served: Process, make_job: MakeJob
) -> None:
    jobs = [make_job(name, rows=80, **_SLOW) for name in ("one", "two")]
    runs = [begin(server, job) for job in jobs]
    assert [server.ended(run)["name"] for run in runs] == ["Completed"] * 2
    assert "the device cpu is in use by" in served.log


@pytest.mark.fault(
    "Prefect server restarts",
    injected="the server is killed while a night runs, and comes back when the night is over",
    outcome="the night ends and is published without it, and says so when the server is back",
)
def test_a_night_needs_no_server_to_end(
    server: PrefectServer, served: Process, make_job: MakeJob
) -> None:
    job = make_job("alone", rows=24, **_SLOW)
    run = begin_slow(server, job, served)
    server.stop()
    try:
        wait_for(job.days_published, "the publication", served)
    finally:
        server.start()
    state = server.ended(run)
    assert state["name"] == "Completed" and "Completed: 24 rows" in state["message"]


@pytest.mark.slow
@pytest.mark.fault(
    "Prefect database locked",
    injected="another process holds the server's SQLite file for five seconds of a night",
    outcome="the night is done and published; its state arrives",
)
def test_a_locked_database_costs_a_night_nothing(
    server: PrefectServer, served: Process, make_job: MakeJob
) -> None:
    job = make_job("locked", rows=20, **_SLOW)
    run = begin_slow(server, job, served)
    with sqlite3.connect(server.database, isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(5)
        database.execute("ROLLBACK")
    database.close()
    assert server.ended(run)["name"] == "Completed"
    assert job.days_published() == [DAY.isoformat()]


@pytest.mark.fault(
    "no Prefect server",
    injected="coppice schedule with a server that does not answer; with none named",
    outcome="exit code 2 within seconds, and what to type",
)
def test_without_a_server_the_schedule_says_what_to_type(
    server: PrefectServer, make_job: MakeJob
) -> None:
    job = make_job()
    words = ("flows", "schedule", str(job.file), "--cron", "0 2 * * *", "--timezone", "UTC")
    process = server.run(*words, PREFECT_API_URL="http://127.0.0.1:9/api")
    started = time.monotonic()
    assert process.wait() == 2
    assert time.monotonic() - started < 30  # most of it imports, on a machine with other work
    assert "prefect server start" in process.log and "PREFECT_API_URL" in process.log
    assert "Traceback" not in process.log


def test_where_no_server_is_named_it_says_what_to_type() -> None:
    unnamed = temporary_settings(restore_defaults={PREFECT_API_URL})
    with unnamed, pytest.raises(UsageError, match="no Prefect server is named; .*PREFECT_API_URL="):
        check_server()


def test_what_is_no_cron_schedule_is_refused_before_a_server_is_asked(make_job: MakeJob) -> None:
    with pytest.raises(UsageError, match="^'every day' is not a cron schedule; write it like"):
        serve(make_job().file, "every day", "UTC")


def test_a_signal_drains_the_running_night(server: PrefectServer, make_job: MakeJob) -> None:
    """Seen red: with Prefect's own handler, a traceback; in the background, no end at all."""
    job = make_job("drained", rows=300, **_SLOW)
    process = server.serve(job.file, "drained")
    run = server.begin("drained", date=DAY.isoformat())
    wait_for(lambda: len(parts(job)) > 3, "parts", process)
    assert process.end(signal.SIGTERM, whole_group=False) == 0
    state = server.ended(run)
    assert (state["type"], state["name"]) == ("CANCELLED", "Interrupted")
    assert "the same command goes on" in state["message"] and "Traceback" not in process.log


@pytest.mark.slow
@pytest.mark.fault(
    "Prefect server restarts",
    injected="the server is away for longer than Prefect's runner has patience (set to seconds)",
    outcome="coppice schedule says so, and serves again when the server is back",
)
def test_the_schedule_outlives_a_server_that_is_away(
    server: PrefectServer, make_job: MakeJob
) -> None:
    """Seen red: Prefect's runner raises, minutes after the server's death as it is set."""
    job = make_job("patient")
    process = server.serve(job.file, "patient", PREFECT_CLIENT_MAX_RETRIES="0")
    server.stop()
    try:
        wait_for(lambda: "the Prefect server is away" in process.log, "it to be missed", process)
    finally:
        server.start()
    assert server.ended(server.begin("patient", date=DAY.isoformat()))["name"] == "Completed"
    assert process.log.count("serving coppice-nightly/patient") == 2


@pytest.mark.slow
def test_a_night_that_nobody_takes_is_late_and_one_without_heartbeat_crashed(
    server: PrefectServer, make_job: MakeJob, receiver: Receiver
) -> None:
    """Ten minutes without a heartbeat are ten seconds here."""
    job = make_job("lost", rows=300, **_SLOW)
    process = server.serve(job.file, "lost")
    shipped = (server.folder / "told.yaml").read_text()
    file = server.folder / "soon.yaml"
    file.write_text(shipped.replace("within: 600", "within: 10"))
    made = server.run("prefect", "automation", "create", "--from-file", str(file))
    assert made.wait() == 0, made.log
    run = server.begin("lost", date=DAY.isoformat())
    wait_for(lambda: len(parts(job)) > 3, "parts", process)
    process.end(signal.SIGKILL)  # the night and who served it: as if the machine were gone
    assert server.ended(run)["name"] == "Crashed"
    wait_for(lambda: told(receiver, "Crashed", f"lost {DAY}"), "the webhook")
    server.begin("lost")
    wait_for(lambda: "Late" in {post["state"] for post in receiver.posts}, "the webhook")
