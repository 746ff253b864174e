"""A run below s3://: rows as of a local run, whatever fails, whoever else writes."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.engine.base import Engine
from pipeline.errors import RunDirectoryError, StorageError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.run import run_job, write_report
from pipeline.settings import JobSettings
from pipeline.status import read_status
from pipeline.storage.remote_folder import RemoteFolder
from pipeline.storage.remote_run import RemoteRun
from pipeline.storage.run_directory import RunDirectory
from pipeline.store_settings import ObjectStoreSettings
from tests.storage.buckets import KEY_ID, SECRET, FailingStore, Store
from tests.storage.tables import answers
from tests.tiny_job import PROMPTS, FailingEngine, on, write_prompts
from tests.tiny_job import answers as local_answers

FINGERPRINT = {"input": "abc", "temperature": 0.0}
DESCRIPTION = {"input": {"rows": 6}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine that a test runs on is its cache."""
    return use_machine(monkeypatch, tmp_path / "cache")


def use_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "coppice" / "runs"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return str(write_prompts(tmp_path / "p.parquet", [*PROMPTS, None]))


@pytest.fixture
def out(bucket: str) -> str:
    return f"s3://{bucket}/deep/out"


def rows_in(store: Store, url: str) -> pl.DataFrame:
    """What a reader of `data/*.parquet` sees, in input order."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    parts = [store.get(bucket, key) for key in store.keys(bucket, f"{prefix}/data/")]
    return pl.concat(pl.read_parquet(io.BytesIO(part)) for part in parts).sort("row_index")


def names_in(store: Store, url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return [key.removeprefix(f"{prefix}/") for key in store.keys(bucket, f"{prefix}/")]


def manifest_in(store: Store, url: str) -> dict[str, Any]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    manifest: dict[str, Any] = json.loads(store.get(bucket, f"{prefix}/run.json"))
    return manifest


def without_times(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.drop([name for name in rows.columns if name.endswith("_s")])


def take(url: str, copies: Path) -> RemoteRun:
    return RemoteRun.take(
        RemoteFolder(Location(url, ObjectStoreSettings())), copies, FINGERPRINT, DESCRIPTION
    )


def commit(run: RunDirectory, *rows: int) -> Path:
    return run.write_part(run.next_part_number(), answers(rows), {"run_id": run.run_id})


def finish(url: str, copies: Path) -> None:
    """A session of four rows in two parts: those that are left, then the seal."""
    with take(url, copies) as run:
        if run.is_sealed and run.is_whole:
            return
        frame = pl.DataFrame({"row_index": [0, 1, 2, 3]})
        for name in ("plan/plan.parquet", "plan/tree.parquet"):
            run.write_frame(name, frame)
        run.write_json("plan/summary.json", {})
        done = set(run.done_rows().tolist())
        for first in (0, 2):
            rows = [row for row in (first, first + 1) if row not in done]
            if rows:
                commit(run, *rows)
        run.append_metrics({"rows_done": 4})
        run.update_manifest(sessions=[*run.read_manifest()["sessions"], {"rows_ok": 4}])
        run.seal(frame["row_index"].to_numpy())


# A whole job.


def test_rows_and_files_are_those_of_a_local_run(
    store: Store, out: str, prompts: str, settings: JobSettings, tmp_path: Path, cache: Path
) -> None:
    run_job(prompts, tmp_path / "local", settings)
    outcome = run_job(prompts, out, settings)
    assert outcome.directory == out
    remote, local = rows_in(store, out), local_answers(tmp_path / "local")
    assert without_times(remote).equals(without_times(local))
    files = sorted(
        path.relative_to(tmp_path / "local").as_posix()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    shown = [name if not name.startswith("data/") else name[:15] for name in names_in(store, out)]
    assert sorted(shown) == [n if not n.startswith("data/") else n[:15] for n in files]
    assert not any(cache.iterdir())  # a nightly job must not fill the disk


def test_polars_reads_the_bucket(
    store: Store, out: str, prompts: str, settings: JobSettings
) -> None:
    run_job(prompts, out, settings)
    options = {
        "aws_endpoint_url": store.url,
        "aws_allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": KEY_ID,
        "aws_secret_access_key": SECRET,
    }
    rows = pl.scan_parquet(f"{out}/data/*.parquet", storage_options=options).collect()
    assert sorted(rows["row_index"]) == list(range(7))


def test_a_sealed_run_has_nothing_left_to_do_and_its_parts_stay_where_they_are(
    store: Store,
    out: str,
    prompts: str,
    settings: JobSettings,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_job(prompts, out, settings)
    idle = FailingEngine(0, lambda: pytest.fail("nothing is left to compute"))
    asked = FailingStore(monkeypatch)
    assert run_job(prompts, out, settings, make_engine=on(idle)).was_complete
    assert not [call for call in asked.calls if "data/" in call or call.startswith("put")]
    assert not any(cache.iterdir())


def test_input_and_output_may_both_be_remote(
    store: Store, bucket: str, prompts: str, settings: JobSettings
) -> None:
    store.put(bucket, "in/p.parquet", Path(prompts).read_bytes())
    run_job(f"s3://{bucket}/in/", f"s3://{bucket}/out", settings)
    assert rows_in(store, f"s3://{bucket}/out").height == 7
    assert manifest_in(store, f"s3://{bucket}/out")["input"]["argument"] == f"s3://{bucket}/in/"


class Killed(BaseException):
    """Ends a session as a kill would: nothing of ours handles it."""


def kill() -> None:
    raise Killed


def after_a_commit(store: Store, out: str, act: Callable[[], object]) -> FailingEngine:
    """An engine that does `act` when a part is committed, with some more rows on their way."""

    def wait() -> None:
        while not manifest_in(store, out)["parts"]:
            time.sleep(0.01)
        act()

    return FailingEngine(3, wait)


def interrupt(store: Store, prompts: str, out: str, settings: JobSettings) -> None:
    dying = after_a_commit(store, out, kill)
    with pytest.raises(Killed):
        run_job(prompts, out, settings, make_engine=on(dying))


def test_another_machine_goes_on_from_what_is_committed(
    store: Store,
    out: str,
    prompts: str,
    settings: JobSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(store, prompts, out, settings)
    before = set(manifest_in(store, out)["parts"])
    assert before and "_SUCCESS" not in names_in(store, out)
    use_machine(monkeypatch, tmp_path / "another")
    run_job(prompts, out, settings)
    run_job(prompts, tmp_path / "local", settings)
    rows, local = rows_in(store, out), local_answers(tmp_path / "local")
    assert rows["row_index"].to_list() == list(range(7))
    assert rows["generated_text"].to_list() == local["generated_text"].to_list()
    manifest = manifest_in(store, out)
    assert before < set(manifest["parts"]) and "_SUCCESS" in names_in(store, out)
    assert [s["end"] for s in manifest["sessions"]] == ["Killed", "complete"]
    assert sum(s["rows_ok"] for s in manifest["sessions"][1:]) < 6


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Input rows in the order in which parts with them were written."""
    rows: list[int] = []
    from pipeline.storage import part_file, run_directory

    real = part_file.write_part

    def write_part(folder: Path, number: int, table: Any, provenance: Any) -> Path:
        rows.extend(table.column("row_index").to_pylist())
        return real(folder, number, table, provenance)

    monkeypatch.setattr(run_directory, "write_part", write_part)
    yield rows


def test_a_bucket_that_vanishes_loses_no_work(
    store: Store,
    bucket: str,
    out: str,
    prompts: str,
    settings: JobSettings,
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losing = after_a_commit(store, out, lambda: store.remove_bucket(bucket))
    said = "(no such bucket; check|was removed while the job ran).*same command again"
    with pytest.raises(StorageError, match=said):
        run_job(prompts, out, settings, make_engine=on(losing))
    with pytest.raises(StorageError, match="no such bucket"):
        run_job(prompts, out, settings)
    store.client.create_bucket(Bucket=bucket)
    run_job(prompts, out, settings)
    assert rows_in(store, out)["row_index"].to_list() == list(range(7))
    assert sorted(computed) == list(range(7))


def test_credentials_that_are_revoked_in_the_middle_lose_no_work(
    store: Store,
    out: str,
    prompts: str,
    settings: JobSettings,
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    revoked = store.revoked()
    losing = after_a_commit(store, out, revoked.__enter__)
    with pytest.raises(StorageError, match="refuses the credentials; check AWS_"):
        run_job(prompts, out, settings, make_engine=on(losing))
    revoked.__exit__(None, None, None)
    run_job(prompts, out, settings)
    assert rows_in(store, out)["row_index"].to_list() == list(range(7))
    assert sorted(computed) == list(range(7))


# Every operation of the store fails once.


@pytest.mark.slow
@pytest.mark.parametrize("answered", [False, True])
def test_whichever_operation_fails_the_same_command_makes_it_good(
    store: Store, bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """On this machine, which has the working copy, and on another, from a copy of the bucket."""
    for fail_at in range(count_calls(f"s3://{bucket}/whole", cache, monkeypatch)):
        with monkeypatch.context() as inner:
            FailingStore(inner, fail_at, answered)
            try:
                finish(f"s3://{bucket}/{fail_at}", cache)
            except StorageError as error:
                assert "cannot be reached" in str(error)
        store.copy(bucket, f"{fail_at}/", f"moved-{fail_at}/")
        for url in (f"s3://{bucket}/{fail_at}", f"s3://{bucket}/moved-{fail_at}"):
            assert_readable(store, url)
            finish(url, cache)
            assert_whole(store, url)


def count_calls(url: str, copies: Path, patch: pytest.MonkeyPatch) -> int:
    with patch.context() as inner:
        counting = FailingStore(inner)
        finish(url, copies)
        return len(counting.calls)


def assert_readable(store: Store, url: str) -> None:
    """What a reader may meet at any moment: no part is named that is not there."""
    names = names_in(store, url)
    if "_SUCCESS" in names:
        assert_whole(store, url)
    elif "run.json" in names:
        assert {f"data/{name}" for name in manifest_in(store, url)["parts"]} <= set(names)


def assert_whole(store: Store, url: str) -> None:
    """Each row once, every part named, nothing else."""
    names, manifest = names_in(store, url), manifest_in(store, url)
    parts = {name.removeprefix("data/") for name in names if name.startswith("data/")}
    assert rows_in(store, url)["row_index"].to_list() == [0, 1, 2, 3]
    assert (parts, manifest["status"]) == (set(manifest["parts"]), "complete")
    plan = {"plan/plan.parquet", "plan/tree.parquet", "plan/summary.json"}
    rest = {"run.json", "metrics.jsonl", "failed.parquet", "README.md", "_SUCCESS"}
    assert {name for name in names if not name.startswith("data/")} == plan | rest


# Two writers.


def test_of_two_that_begin_at_once_one_goes_on(store: Store, out: str, cache: Path) -> None:
    ready = threading.Barrier(2)
    ends: list[RemoteRun | RunDirectoryError] = []

    def begin(copies: Path) -> None:
        folder = RemoteFolder(Location(out, ObjectStoreSettings()))
        real = folder.check_conditions
        folder.check_conditions = lambda: (real(), ready.wait())  # type: ignore[method-assign,assignment]
        try:
            ends.append(RemoteRun.take(folder, copies, FINGERPRINT, DESCRIPTION))
        except RunDirectoryError as error:
            ends.append(error)

    threads = [threading.Thread(target=begin, args=(cache / name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [end for end in ends if isinstance(end, RemoteRun)]
    losers = [end for end in ends if isinstance(end, RunDirectoryError)]
    assert (len(winners), len(losers)) == (1, 1)
    assert "was taken over by process" in str(losers[0])
    commit(winners[0], 0)
    assert rows_in(store, out).height == 1
    winners[0].close()


def test_who_was_taken_over_stops_and_leaves_nothing(
    store: Store, out: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = take(out, cache / "a")
    commit(slow, 0, 1)
    with take(out, cache / "b") as quick:
        assert "took over" in caplog.text
        assert quick.done_rows().tolist() == [0, 1]
        with pytest.raises(RunDirectoryError, match="taken over by process .*; let that one"):
            commit(slow, 2)
        with pytest.raises(RunDirectoryError, match="taken over"):
            slow.write_text("report.md", "late")
        slow.close()
        commit(quick, 2, 3)
    assert rows_in(store, out)["row_index"].to_list() == [0, 1, 2, 3]
    assert set(manifest_in(store, out)["parts"]) == {p.name for p in quick.data.iterdir()}
    finish(out, cache / "a")  # the loser again: what it had computed meanwhile is out of date
    assert_whole(store, out)


def test_who_was_taken_over_removes_nothing_of_the_successor(
    store: Store, out: str, cache: Path
) -> None:
    slow = take(out, cache / "a")
    commit(slow, 0)
    with take(out, cache / "b") as quick:
        name = commit(quick, 1).name
        with pytest.raises(RunDirectoryError, match="taken over"):
            slow.seal(slow.done_rows())
        slow.close()
        assert f"data/{name}" in names_in(store, out)
    assert "_SUCCESS" not in names_in(store, out)


def test_a_part_whose_successor_knows_it_is_not_taken_back(
    store: Store, out: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the commit is lost, and somebody takes over before it is asked for again."""
    first, seconds = take(out, cache / "a"), []
    real = first._folder.put_if

    def put_twice(name: str, content: bytes, etag: str | None) -> str:
        real(name, content, etag)
        seconds.append(take(out, cache / "b"))
        return real(name, content, etag)

    monkeypatch.setattr(first._folder, "put_if", put_twice)
    with pytest.raises(RunDirectoryError, match="taken over"):
        commit(first, 0)
    first.close()
    assert seconds[0].done_rows().tolist() == [0]
    assert rows_in(store, out)["row_index"].to_list() == [0]
    seconds[0].close()


def test_a_commit_whose_answer_was_lost_is_not_taken_for_anothers(
    store: Store, out: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore asks again when an answer is lost, and meets what it wrote itself."""
    real = RemoteFolder._ask

    def ask_twice(folder: RemoteFolder, what: str, operation: str, *about: Any, **how: Any) -> Any:
        if operation == "put" and about[0].endswith("run.json"):
            real(folder, what, operation, *about, **how)
        return real(folder, what, operation, *about, **how)

    monkeypatch.setattr(RemoteFolder, "_ask", ask_twice)
    finish(out, cache)
    assert_whole(store, out)


def test_a_second_process_of_this_machine_is_refused_with_the_url(out: str, cache: Path) -> None:
    with take(out, cache), pytest.raises(RunDirectoryError, match=f"{out} is in use by process"):
        take(out, cache)


def test_a_store_that_ignores_conditions_is_refused(
    store: Store, out: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RemoteFolder._ask

    def careless(folder: RemoteFolder, what: str, operation: str, *about: Any, **how: Any) -> Any:
        return real(
            folder, what, operation, *about, **{n: v for n, v in how.items() if n != "mode"}
        )

    monkeypatch.setattr(RemoteFolder, "_ask", careless)
    with pytest.raises(RunDirectoryError, match="ignores conditional writes.*; write to a folder"):
        take(out, cache)
    assert names_in(store, out) == []


# What is there already.


def test_parts_that_nobody_names_are_removed(store: Store, bucket: str, cache: Path) -> None:
    url = f"s3://{bucket}/run"
    with take(url, cache) as run:
        left = commit(run, 0, 1)
        content = left.read_bytes()
    stray = "run/data/part-00007-0123456789ab.parquet"
    store.put(bucket, stray, content)
    with take(url, cache) as run:
        assert stray not in store.keys(bucket)
        store.put(bucket, stray, content)  # a slow PUT of somebody who lost
        run.seal(run.done_rows())
    assert rows_in(store, url)["row_index"].to_list() == [0, 1]


def test_a_foreign_parquet_file_among_the_parts_is_refused(
    store: Store, bucket: str, cache: Path
) -> None:
    take(f"s3://{bucket}/run", cache).close()
    store.put(bucket, "run/data/mine.parquet", b"x")
    with pytest.raises(StorageError, match="mine.parquet is not a part of this run; move it out"):
        take(f"s3://{bucket}/run", cache)


def test_a_prefix_with_something_else_in_it_is_refused_before_anything_is_computed(
    store: Store, bucket: str, prompts: str, settings: JobSettings
) -> None:
    store.put(bucket, "out/notes.txt", b"mine")

    def load(_: JobSettings) -> Engine:
        pytest.fail("must not load")

    with pytest.raises(RunDirectoryError, match="not empty and holds no run"):
        run_job(prompts, f"s3://{bucket}/out", settings, make_engine=load)
    assert store.keys(bucket) == ["out/notes.txt"]


def test_another_job_is_refused_by_name_of_the_field(out: str, cache: Path) -> None:
    take(out, cache).close()
    other = {**FINGERPRINT, "temperature": 1.0}
    folder = RemoteFolder(Location(out, ObjectStoreSettings()))
    with pytest.raises(RunDirectoryError, match=f"{out} holds a run with another temperature"):
        RemoteRun.take(folder, cache, other, DESCRIPTION)


def test_a_part_that_went_from_a_sealed_run_is_made_again(
    store: Store, bucket: str, prompts: str, settings: JobSettings, computed: list[int]
) -> None:
    url = f"s3://{bucket}/run"
    run_job(prompts, url, settings)
    name = sorted(manifest_in(store, url)["parts"])[1]
    lost = pl.read_parquet(io.BytesIO(store.get(bucket, f"run/data/{name}")))["row_index"]
    store.delete(bucket, f"run/data/{name}")
    computed.clear()
    run_job(prompts, url, settings)
    assert sorted(computed) == sorted(lost)
    assert rows_in(store, url)["row_index"].to_list() == list(range(7))
    assert "_SUCCESS" in names_in(store, url)


def test_a_part_that_was_altered_is_named_and_not_kept(
    store: Store, bucket: str, cache: Path
) -> None:
    url = f"s3://{bucket}/run"
    with take(url, cache) as run:
        name, content = commit(run, 0).name, run.data.joinpath(commit(run, 1).name).read_bytes()
    good = store.get(bucket, f"run/data/{name}")
    store.put(bucket, f"run/data/{name}", good[:-20] + bytes(20))
    assert content != good
    with pytest.raises(StorageError, match=f"{url}/data/{name} was altered .*; delete it"):
        take(url, cache / "another")
    store.put(bucket, f"run/data/{name}", good)
    with take(url, cache / "another") as run:
        assert run.done_rows().tolist() == [0, 1]


def test_a_part_that_goes_while_the_job_runs_stops_the_seal(
    store: Store, bucket: str, cache: Path
) -> None:
    with take(f"s3://{bucket}/run", cache) as run:
        name = commit(run, 0).name
        store.delete(bucket, f"run/data/{name}")
        with pytest.raises(StorageError, match="not there any more; run the same command again"):
            run.seal(run.done_rows())
    with take(f"s3://{bucket}/run", cache) as run:
        run.seal(run.done_rows())
    assert f"run/data/{name}" in store.keys(bucket)


def test_a_run_directory_may_be_copied_there_and_back(
    store: Store, bucket: str, tmp_path: Path, cache: Path
) -> None:
    local = RunDirectory.create_or_resume(tmp_path / "local", FINGERPRINT, DESCRIPTION)
    commit(local, 0, 1)
    local.close()
    for path in local.root.rglob("*"):
        if path.is_file() and path.name != ".lock":
            store.put(bucket, path.relative_to(tmp_path).as_posix(), path.read_bytes())
    url = f"s3://{bucket}/local"
    assert read_status(Location(url))["rows_done"] == 2
    with take(url, cache) as run:
        commit(run, 2)
        (tmp_path / "local" / "run.json").write_bytes((run.root / "run.json").read_bytes())
    assert len(manifest_in(store, url)["parts"]) == 2
    RunDirectory.create_or_resume(tmp_path / "local", FINGERPRINT, DESCRIPTION).close()
    held = json.loads((tmp_path / "local" / "run.json").read_text())
    assert not {"parts", "writer"} & held.keys()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://bucket/out", "ftp:// is not supported; use a folder, s3://, gs:// or az://"),
        (f"s3://{KEY_ID}:{SECRET}@bucket/out", "credentials belong to"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    prompts: str, settings: JobSettings, url: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        run_job(prompts, url, settings)
    assert SECRET not in str(error.value)


def test_a_store_that_is_not_there_is_an_error_at_once(
    out: str, prompts: str, settings: JobSettings
) -> None:
    away = ObjectStoreSettings(storage_options={"endpoint_url": "http://127.0.0.1:9"})
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot be reached; check the network"):
        run_job(prompts, out, settings.model_copy(update={"store": away}))
    assert time.monotonic() - started < 10


# Commands that read.


def test_status_report_and_responses_are_those_of_a_folder(
    store: Store,
    bucket: str,
    prompts: str,
    settings: JobSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://{bucket}/run"
    interrupt(store, prompts, url, settings)
    with monkeypatch.context() as inner:
        asked = FailingStore(inner)
        state = read_status(Location(url))
        assert not [call for call in asked.calls if "data/" in call]
    assert (state["status"], state["rows"]) == ("failed", 7)
    assert 0 < state["rows_done"] < 7 and state["rows_failed"] == 1
    run_job(prompts, url, settings)
    state = read_status(Location(url))
    assert (state["status"], state["rows_done"], state["rows_failed"]) == ("complete", 7, 1)
    assert state["rows_per_s"] is not None
    assert write_report(Location(url))["page"] == f"{url}/report.html"
    page = store.get(bucket, "run/report.html")
    assert b"hello" not in page and b'<svg class="tree"' in page
    assert {"run/report.html", "run/report.md"} < set(store.keys(bucket))
    assert convert(Location(url), Location(tmp_path / "responses.jsonl")) == 7
    with pytest.raises(RunDirectoryError, match="holds no run"):
        read_status(Location(f"s3://{bucket}/elsewhere"))


def test_status_tells_a_running_job_from_a_dead_one(store: Store, bucket: str, cache: Path) -> None:
    url = f"s3://{bucket}/run"
    with take(url, cache) as run:
        commit(run, 0)
        assert read_status(Location(url))["status"] == "running"
        run.update_manifest(writer={"name": "process 999999999 on elsewhere"})
        assert read_status(Location(url))["status"] == "running"  # nobody here can tell
        run.update_manifest(writer={"name": run.read_manifest()["writer"]["name"]})


def test_an_audit_reads_and_writes_there(
    store: Store, bucket: str, model_folder: Path, tmp_path: Path
) -> None:
    from pipeline.audit.auditing import audit_run, describe_audit

    url = f"s3://{bucket}/run"
    source = write_prompts(tmp_path / "p.parquet", ["hello world", "hello there"])
    store.put(bucket, "in/p.parquet", source.read_bytes())
    settings = JobSettings.from_flat(
        {"model": str(model_folder), "engine": "naive", "max_new_tokens": 3}
    )
    run_job(f"s3://{bucket}/in/", url, settings)
    verdict = audit_run(Location(url), settings.audit)
    assert verdict.passed and describe_audit(Location(url))["rows_audited"] == verdict.rows_audited
    assert {"run/audit/audit.parquet", "run/audit/summary.json"} < set(store.keys(bucket))
    assert read_status(Location(url))["audit"] == "pass"


# Secrets, and what is left on the disk.


def test_secrets_are_in_no_file(
    store: Store,
    bucket: str,
    prompts: str,
    settings: JobSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {
        "access_key_id": "CANARY-id",
        "secret_access_key": "CANARY-key",
        "session_token": "CANARY-token",
        "region": "us-east-1",
    }
    chosen = settings.model_copy(update={"store": ObjectStoreSettings(storage_options=options)})
    store.put(bucket, "in/p.parquet", Path(prompts).read_bytes())
    interrupt(store, f"s3://{bucket}/in/", f"s3://{bucket}/run", chosen)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    run_job(f"s3://{bucket}/in/", f"s3://{bucket}/run", chosen)
    write_report(Location(f"s3://{bucket}/run", chosen.store))
    files += [store.get(bucket, key) for key in store.keys(bucket)]
    assert not [content for content in files if b"CANARY" in content]
    assert "CANARY" not in caplog.text
    held = manifest_in(store, f"s3://{bucket}/run")["settings"]["store"]
    assert held == {"storage_options": {"region": "us-east-1"}}


def test_working_copies_that_nobody_came_back_for_are_removed(
    out: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(f"{out}-old", cache).close()
    with take(f"{out}-held", cache) as held:
        monkeypatch.setattr("pipeline.storage.remote_run._STALE_S", -1)
        with take(out, cache) as run:
            assert {path.name for path in cache.iterdir()} == {held.root.name, run.root.name}
