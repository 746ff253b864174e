"""Whole jobs on a real cluster of two workers: same rows, and none lost or doubled by a death.

Where the engine does not matter it is the echo engine, for loading torch takes most of the time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.engine.base import EngineFactory
from pipeline.engine.load import make_engine
from pipeline.errors import Interrupted, TimeBudgetReached, UsageError
from pipeline.job import stopping
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, FleetSettings, JobSettings
from tests.conversation_job import AS_TURNS, Turn, write_turns
from tests.executor.ray_engines import make_carrying, make_watched
from tests.tiny_job import answers, write_prompts

ROWS = 240
PROMPTS = [
    f"{'instructions of all rows' if row % 3 else 'others: '} {row // 5} and {row}"
    for row in range(ROWS)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "p.parquet", [*PROMPTS])


Settings = Callable[..., JobSettings]
Patch = pytest.MonkeyPatch
Expected = dict[str, pl.DataFrame]


@pytest.fixture(scope="module")
def settings_of(model_folder: Path) -> Settings:
    def make(executor: str = "ray", engine: str = "echo", **flat: object) -> JobSettings:
        fleet = {"executor": executor} | ({"num_workers": 2} if executor == "ray" else {})
        common = {"max_new_tokens": 6, "rows_per_part": 20, "max_rows": 8}
        model = {"model": str(model_folder), "engine": engine, "dtype": "float32"}
        return JobSettings.from_flat({**model, **common, **fleet, **flat})

    return make


@pytest.fixture(scope="module")
def expected(settings_of: Settings, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """The same job on this machine, by engine."""
    folder = tmp_path_factory.mktemp("local")
    source = write_prompts(folder / "p.parquet", [*PROMPTS])
    for engine in ("prefix", "echo"):
        run_job(str(source), folder / engine, settings_of("local", engine))
    return {engine: answers(folder / engine) for engine in ("prefix", "echo")}


def same(rows: pl.DataFrame, expected: pl.DataFrame) -> bool:
    """Every row once, with the same answer."""
    columns = ["id", "row_index", "generated_text", "completion_token_ids", "reuse_depth"]
    return rows.select(columns).equals(expected.select(columns))


def counters(out: Path) -> dict[str, float]:
    session: dict[str, float] = json.loads((out / "run.json").read_text())["sessions"][-1]
    return session


def pids(workers: Path, kind: str = "answered") -> list[int]:
    return [int(path.stem) for path in workers.glob(f"*.{kind}")]


@contextmanager
def meanwhile(ready: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """`act` in another thread as soon as `ready`."""
    over = threading.Event()

    def watch() -> None:
        while not ready():
            if over.wait(0.02):
                return
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kill_all(numbers: list[int]) -> None:
    for pid in numbers:
        os.kill(pid, signal.SIGKILL)


def test_two_workers_answer_as_one_and_count_every_token(
    workers: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    expected: Expected,
) -> None:
    """The session itself holds prefilled and cached tokens against the plan; the audit is the one
    of any run."""
    out = tmp_path / "out"
    outcome = run_job(str(source), out, settings_of(engine="prefix"), make_engine=make_watched)
    assert same(answers(out), expected["prefix"])
    session, manifest = counters(out), json.loads((out / "run.json").read_text())
    assert session["prefilled_tokens"] == (
        outcome.counters["unique_tokens"] + session["replicated_tokens"]
    )
    assert session["replicated_tokens"] > 0 and not session["lost_workers"]
    assert manifest["engine"]["name"] == "prefix"
    assert "ray: 2 workers with a CPU each" in manifest["engine"]["notes"][0]
    assert len(pids(workers)) == 2, "one worker has done it all"
    assert answers(out)["latency_s"].min() > 0  # type: ignore[operator]
    assert audit_run(Location(out), AuditSettings(audit_sample="10%", audit_arms=0)).passed


@pytest.mark.fault(
    "a machine of the cluster dies",
    injected="kill -9 of a Ray actor that has answered some rows and has others on the device",
    outcome="its unanswered rows are computed by others; every row once, as on one machine",
)
@pytest.mark.parametrize(
    ("engine", "victims"),
    [
        ("echo", 1),
        pytest.param("echo", 2, marks=pytest.mark.slow),
        pytest.param("prefix", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_workers_cost_no_row(
    workers: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    expected: Expected,
    engine: str,
    victims: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One of two, and both at once. Seen red: `lose` that forgot what waited at the worker."""
    out = tmp_path / "out"
    (workers / "pace").write_text("0.02")
    with (
        caplog.at_level(logging.WARNING, "coppice"),
        meanwhile(lambda: len(pids(workers)) == 2, lambda: kill_all(pids(workers)[:victims])),
    ):
        run_job(str(source), out, settings_of(engine=engine), make_engine=make_watched)
    assert same(answers(out), expected[engine])
    assert counters(out)["lost_workers"] == victims
    assert "its process or its machine died" in caplog.text


@pytest.mark.fault(
    "a row that kills every machine",
    injected="a prompt on which the Ray actor kills its own process, whichever it is",
    outcome="a row with status = error after a few replacements; all others answered",
)
def test_a_row_that_kills_its_workers_becomes_an_error(
    workers: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    expected: Expected,
) -> None:
    from pipeline.tokens.tokenizer import PromptTokenizer

    settings = settings_of(fail_on_error="1")
    tokenizer = PromptTokenizer.load(settings.model.model, None, settings.tokens)
    ids = tokenizer.encode_batch([PROMPTS[77]]).flat.tolist()
    (workers / "poison").write_text(" ".join(map(str, ids)))
    out = tmp_path / "out"
    run_job(str(source), out, settings, make_engine=make_watched)
    rows = answers(out)
    failed = rows.filter(pl.col("status") == "error")
    assert failed["row_index"].to_list() == [77]
    assert failed["error_type"].to_list() == ["WorkerLost"]
    others = pl.col("row_index") != 77
    assert same(rows.filter(others), expected["echo"].filter(others))
    assert 3 <= counters(out)["lost_workers"] <= 6


@pytest.mark.parametrize("first", ["ray", "local"])
def test_an_interrupted_job_goes_on_elsewhere(
    workers: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    expected: Expected,
    first: str,
) -> None:
    """On Ray what was begun here, and the other way round: where is no part of what a job is."""
    out = tmp_path / "out"
    second = {"ray": "local", "local": "ray"}[first]
    (workers / "pace").write_text("0.02")
    committed = out / "data"
    with (
        meanwhile(
            lambda: any(committed.glob("part-*")), lambda: os.kill(os.getpid(), signal.SIGINT)
        ),
        pytest.raises(Interrupted, match="same command"),
    ):
        run_job(str(source), out, settings_of(first, rows_per_part=5), make_engine=make_watched)
    before = answers(out).height
    assert 0 < before < ROWS
    (workers / "pace").unlink()
    run_job(str(source), out, settings_of(second, rows_per_part=5), make_engine=make_watched)
    assert same(answers(out), expected["echo"])
    ends = [s["end"] for s in json.loads((out / "run.json").read_text())["sessions"]]
    assert ends == ["Interrupted", "complete"]


def test_a_spent_budget_drains_the_workers(
    workers: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has begun is finished and committed, in whichever worker it is."""
    (workers / "pace").write_text("0.02")
    monkeypatch.setattr(stopping.StopRequest, "should_drain", lambda self: bool(pids(workers)))
    monkeypatch.setattr(stopping.StopRequest, "should_abort", lambda self: False)
    out = tmp_path / "out"
    with pytest.raises(TimeBudgetReached):
        run_job(str(source), out, settings_of(time_budget="1h"), make_engine=make_watched)
    assert 0 < answers(out).height < ROWS
    assert not [t for t in threading.enumerate() if t.name in ("writer", "ticker")]


def test_a_second_signal_does_not_wait_for_workers(
    workers: Path, source: Path, tmp_path: Path, settings_of: Settings
) -> None:
    (workers / "pace").write_text("5")
    out = tmp_path / "out"

    def signal_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    begin = time.monotonic()
    with meanwhile(lambda: bool(pids(workers)), signal_twice), pytest.raises(Interrupted):
        run_job(str(source), out, settings_of(), make_engine=make_watched)
    assert time.monotonic() - begin < 40, "240 rows at 5 s each were waited for"


def test_another_model_on_a_workers_machine_is_refused(
    cluster: Path,
    source: Path,
    tmp_path: Path,
    settings_of: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By content, not by path: rows of another model would be wrong and look right."""
    from pipeline.errors import ModelError
    from pipeline.job import job as opened

    monkeypatch.setattr(
        opened, "identify_model", lambda model: {"model": "of the driver", "revision": None}
    )
    with pytest.raises(ModelError, match="not the model of the machine that began"):
        run_job(str(source), tmp_path / "out", settings_of(), make_engine=make_watched)


def test_more_workers_than_the_cluster_has_are_refused(
    cluster: Path, source: Path, tmp_path: Path, settings_of: Settings
) -> None:
    with pytest.raises(UsageError, match="0 GPUs and 2 CPUs.*--num-workers"):
        run_job(str(source), tmp_path / "out", settings_of(num_workers=3), make_engine=make_watched)


def test_each_worker_computes_with_its_share_of_the_cpus(cluster: Path) -> None:
    from pipeline.executor.ray_crew import Share, share_out

    def shares(nodes: list[dict[str, float]], workers: int | None = None) -> Share:
        return share_out(nodes, FleetSettings(executor="ray", num_workers=workers), "auto")

    assert shares([{"CPU": 8.0}]) == Share(1, 8, 0, 1)
    assert shares([{"CPU": 8.0}], 3) == Share(3, 2, 0, 3)
    assert shares([{"CPU": 8.0}, {"CPU": 2.0}, {}], 3) == Share(3, 2, 0, 3)
    assert shares([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}]) == Share(2, 1, 1, 2)
    assert share_out([{"CPU": 4.0, "GPU": 1.0}], FleetSettings(executor="ray"), "cpu").gpus == 0
    for device, nodes in (("cuda", [{"CPU": 2.0}]), ("cuda:1", [{"GPU": 2.0}])):
        with pytest.raises(UsageError, match="--device"):
            share_out(nodes, FleetSettings(executor="ray"), device)


TALKS: list[Turn] = [
    (f"talk {talk}", turn, f"{talk % 3}: {'why? and who ' if turn else 'hello all of you'}")
    for turn in range(5)
    for talk in range(40)
]


@pytest.mark.parametrize("make", [make_carrying, pytest.param(make_engine, marks=pytest.mark.slow)])
def test_conversations_are_whole_on_a_worker_and_answered_as_on_one_machine(
    workers: Path, tmp_path: Path, settings_of: Settings, make: EngineFactory
) -> None:
    """With tokens given up, which the workers tell."""
    table = write_turns(tmp_path / "turns.parquet", TALKS)
    flat = {**AS_TURNS, "engine": "prefix", "evict": "sink-recent", "budget_tokens": 48}
    run_job(str(table), tmp_path / "local", settings_of("local", **flat), make_engine=make)
    run_job(str(table), tmp_path / "ray", settings_of(**flat), make_engine=make)
    here, there = answers(tmp_path / "local"), answers(tmp_path / "ray")
    names = ["id", "turn", "completion_token_ids", "prompt_tokens", "evictions", "eviction_log"]
    assert here["evictions"].sum() and there.select(names).equals(here.select(names))


@pytest.mark.fault(
    "conversations",
    injected="SIGTERM while Ray actors are in the middle of turns",
    outcome="the next call goes on after the turns that are there; all as on one machine",
)
def test_conversations_on_workers_go_on_after_a_signal(
    workers: Path, tmp_path: Path, settings_of: Settings
) -> None:
    table, out = write_turns(tmp_path / "turns.parquet", TALKS), tmp_path / "ray"
    flat: dict[str, Any] = {**AS_TURNS, "rows_per_part": 3}  # a conversation has five turns
    run_job(str(table), tmp_path / "local", settings_of("local", **flat))
    (workers / "pace").write_text("0.02")
    with (
        meanwhile(
            lambda: any((out / "data").glob("part-*")),
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        ),
        pytest.raises(Interrupted, match="same command"),
    ):
        run_job(str(table), out, settings_of(**flat), make_engine=make_watched)
    assert 0 < len(answers(out)) < len(TALKS)
    (workers / "pace").unlink()
    run_job(str(table), out, settings_of(**flat), make_engine=make_watched)
    names = ["id", "turn", "completion_token_ids", "prompt_tokens", "history_tokens"]
    assert answers(out).select(names).equals(answers(tmp_path / "local").select(names))


@pytest.mark.slow  # half a minute: each worker loads a model
def test_workers_score_as_one_machine_does(
    cluster: Path, tmp_path: Path, settings_of: Settings
) -> None:
    texts: list[str | None] = [
        f"{'yes' if n % 2 else 'no'} is what {n // 4} says:" for n in range(60)
    ]
    source = write_prompts(
        tmp_path / "in.parquet", texts, choices=[[" yes", " no", " nobody"]] * 60
    )
    flat: dict[str, Any] = {"engine": "prefix", "max_new_tokens": None, "choices_column": "choices"}
    run_job(str(source), tmp_path / "local", settings_of("local", **flat))
    run_job(str(source), tmp_path / "ray", settings_of(**flat))
    here, there = answers(tmp_path / "local"), answers(tmp_path / "ray")
    names = ["id", "choice_index", "token_counts", "prompt_tokens"]
    assert there.select(names).equals(here.select(names))
    gap = here["loglikelihoods"].explode() - there["loglikelihoods"].explode()
    assert gap.abs().max() < 1e-4  # type: ignore[operator]
    counted = counters(tmp_path / "ray")
    assert counted["prefilled_tokens"] == counted["unique_tokens"] + counted["replicated_tokens"]
