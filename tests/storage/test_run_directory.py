"""The run directory: made once, resumed, refused, sealed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.location import Location
from pipeline.status import read_status
from pipeline.storage.lock import is_abandoned
from pipeline.storage.part_file import write_part
from pipeline.storage.run_directory import RunDirectory
from tests.storage.disk import CODES, FailingDisk
from tests.storage.tables import answers

FINGERPRINT: dict[str, Any] = {"input": "aa" * 32, "model": "m", "sampling": {"seed": 0}}


def create(root: Path, **changes: Any) -> RunDirectory:
    return RunDirectory.create_or_resume(root, FINGERPRINT | changes, {"device": {"name": "cpu"}})


def add(run: RunDirectory, rows: list[int], **options: Any) -> Path:
    table = answers(rows, **options)
    return write_part(run.data, run.next_part_number(), table, {"run_id": run.run_id})


def test_a_new_run_describes_itself(tmp_path: Path) -> None:
    with create(tmp_path / "new" / "out") as run:
        manifest = run.read_manifest()
        assert manifest["fingerprint"] == FINGERPRINT and manifest["status"] == "running"
        assert manifest["device"] == {"name": "cpu"} and len(run.run_id) == 16
        assert run.done_rows().tolist() == [] and run.next_part_number() == 0
        assert run.scan().collect().height == 0 and not run.is_sealed


def test_resume_knows_what_is_done(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        add(run, [5, 1])
        created = run.read_manifest()
    with create(tmp_path) as run:
        assert run.read_manifest() == created
        assert run.done_rows().tolist() == [1, 5] and run.next_part_number() == 1
        add(run, [0])
        assert run.done_rows().tolist() == [0, 1, 5] and run.next_part_number() == 2
        assert sorted(run.scan().collect()["row_index"]) == [0, 1, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, 'another model ("m", now "other")'),
        ({"input": "ab" * 32}, "another input ("),
        ({"extra": 1}, "another extra (null, now 1)"),
        ({"sampling": {"seed": 1}}, "another seed (0, now 1)"),
        ({"input": "cd" * 32, "limit": 10}, "another limit (null, now 10)"),
    ],
)
def test_another_job_is_refused_and_the_field_named(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    create(tmp_path).close()
    with pytest.raises(RunDirectoryError) as caught:
        create(tmp_path, **changes)
    assert said in str(caught.value) and "choose a new folder" in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200  # values are shortened
    create(tmp_path, sampling={"seed": 0}).close()  # and the lock is free again


def test_a_fingerprint_is_compared_as_json(tmp_path: Path) -> None:
    create(tmp_path, stop=("a",)).close()
    create(tmp_path, stop=("a",)).close()
    create(tmp_path, stop=["a"]).close()
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"]["stop"] == ["a"]


def test_foreign_folders_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunDirectoryError, match="not empty"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunDirectoryError, match="cannot use"):
        create(tmp_path / "thesis.txt")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}', "\xff"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    create(tmp_path).close()
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(RunDirectoryError, match="no readable"):
        create(tmp_path)
    with pytest.raises(RunDirectoryError, match="no readable"):
        RunDirectory.open(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.update_manifest(schema_version=99)
    with pytest.raises(RunDirectoryError, match="version 99"):
        RunDirectory.open(tmp_path)


HOLD = """
import sys, time
from pipeline.storage.run_directory import RunDirectory
run = RunDirectory.create_or_resume(sys.argv[1], {}, {})
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.fault(
    "two writers",
    injected="a second process in the same folder",
    outcome="RunDirectoryError, exit code 2, the owner is named",
)
@pytest.mark.fault("stale lock", injected="the owner is killed", outcome="taken over, and logged")
def test_one_writer_and_a_dead_one_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=f"in use by process {other.pid} on "):
            RunDirectory.create_or_resume(tmp_path, {}, {})
        assert RunDirectory.open(tmp_path).read_manifest()["fingerprint"] == {}
        other.kill()
    with caplog.at_level(logging.WARNING, "coppice"):
        RunDirectory.create_or_resume(tmp_path, {}, {}).close()
    assert f"took over the lock of {tmp_path}, which process {other.pid}" in caplog.text
    caplog.clear()
    RunDirectory.create_or_resume(tmp_path, {}, {}).close()
    assert not caplog.text


def test_temp_files_of_a_dead_writer_are_dropped(tmp_path: Path) -> None:
    create(tmp_path).close()
    (tmp_path / "plan").mkdir()
    temps = [
        tmp_path / ".run.json.7.tmp",
        tmp_path / "data" / ".part-00001.7.tmp",
        tmp_path / "plan" / ".plan.parquet.7.tmp",
    ]
    mine = tmp_path / "plan" / "notes.tmp"
    for path in [*temps, mine]:
        path.write_text("half")
    create(tmp_path).close()
    assert mine.exists() and not any(path.exists() for path in temps)


def test_a_crash_before_the_manifest_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on gone")
    (tmp_path / ".run.json.7.tmp").write_text("{")
    create(tmp_path).close()
    assert (tmp_path / "run.json").exists() and not (tmp_path / ".run.json.7.tmp").exists()


@pytest.mark.fault(
    "committed part altered",
    injected="a byte added, a part of another run, a foreign file",
    outcome="StorageError, exit code 1, the file is named",
)
def test_altered_and_foreign_parts_are_named(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        path = add(run, [0, 1])
        assert run.done_rows().tolist() == [0, 1]
        path.write_bytes(path.read_bytes() + b"x")
    with create(tmp_path) as run:
        with pytest.raises(StorageError, match=f"{path.name} was altered"):
            run.done_rows()
        path.unlink()
        foreign = write_part(run.data, 1, answers([0]), {"run_id": "other"})
        with pytest.raises(StorageError, match="belongs to the run other"):
            run.done_rows()
        foreign.rename(run.data / "mine.parquet")
        with pytest.raises(StorageError, match=r"mine\.parquet is not a part"):
            run.scan()


def test_a_row_in_two_parts_is_refused(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        first, second = add(run, [0, 1]), add(run, [2, 1])
        with pytest.raises(StorageError, match="row 1 is in two parts") as caught:
            run.done_rows()
        assert first.name in str(caught.value) and second.name in str(caught.value)


def test_seal_counts_and_marks_last(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        add(run, [2, 0], failed=[2])
        with pytest.raises(StorageError, match=r"1 of 3 rows have no answer .*first: row 1"):
            run.seal(np.arange(3))
        assert not run.is_sealed and not (tmp_path / "failed.parquet").exists()
        add(run, [1])
        run.seal(np.arange(3))
        assert run.is_sealed and run.read_manifest()["status"] == "complete"
    assert pl.read_parquet(tmp_path / "failed.parquet")["row_index"].to_list() == [2]
    card = (tmp_path / "README.md").read_text()
    assert "3 rows, 1 of them failed" in card and "data_files: data/*.parquet" in card
    assert RunDirectory.open(tmp_path).is_sealed


def test_seal_refuses_rows_and_ids_that_do_not_belong(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        add(run, [0, 1, 2])
        with pytest.raises(StorageError, match="holds 3 rows where 2 were planned"):
            run.seal(np.arange(2))
        table = answers([3])
        table = table.set_column(0, table.schema.field("id"), answers([0]).column("id"))
        write_part(run.data, 1, table, {})
        with pytest.raises(StorageError, match="only 3 different ids"):
            run.seal(np.arange(4))


def test_a_reader_may_add_files_but_not_change_the_run(tmp_path: Path) -> None:
    create(tmp_path).close()
    reader = RunDirectory.open(tmp_path)
    reader.write_json("audit/summary.json", {"verdict": "pass"})
    reader.write_frame("audit/audit.parquet", pl.DataFrame({"id": ["é"]}))
    reader.write_text("report.md", "# é\n")
    assert json.loads((tmp_path / "audit" / "summary.json").read_text())["verdict"] == "pass"
    assert pl.read_parquet(tmp_path / "audit" / "audit.parquet")["id"].to_list() == ["é"]
    with pytest.raises(RunDirectoryError, match="opened for reading"):
        reader.update_manifest(status="complete")
    with pytest.raises(RunDirectoryError, match="opened for reading"):
        reader.seal(np.arange(0))
    with pytest.raises(AssertionError):
        reader.write_text("../escaped", "")
    with pytest.raises(ValueError, match="not JSON compliant"):
        reader.write_json("x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()


def test_metrics_are_lines(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.append_metrics({"rows": 1})
        run.append_metrics({"rows": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rows"] for line in lines] == [1, 2]


def test_a_torn_line_of_metrics_is_cut_off(tmp_path: Path) -> None:
    """Seen red: the next line was joined to the half one, and `status` could not read either."""
    with create(tmp_path) as run:
        run.update_manifest(input={"rows": 1})
        run.append_metrics({"rows": 1})
        for torn in ('{"rows": 2', "\0" * 5000):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(torn)
            assert read_status(Location(tmp_path))["rows_left"] == 1
            run.append_metrics({"rows": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rows"] for line in lines] == [1, 3, 3]


def test_a_lock_whose_name_cannot_be_taken_away_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red: the job was complete, raised OSError, and held the lock until the process ended."""

    def refuse(file: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    run = create(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        run.close()
    with caplog.at_level(logging.WARNING, "coppice"):
        create(tmp_path).close()
    assert "took over the lock" in caplog.text


@pytest.mark.parametrize("owner", ["", "proc", "process 12", "process 999999999 on {host}"])
def test_nobody_holds_a_lock_with_half_a_name(tmp_path: Path, owner: str) -> None:
    with create(tmp_path) as run:
        run.update_manifest(input={"rows": 1})
    (tmp_path / ".lock").write_text(owner.format(host=socket.gethostname()))
    assert is_abandoned(tmp_path) and read_status(Location(tmp_path))["status"] == "stopped"


def whole_job(root: Path) -> None:
    """What a run does to its folder, from nothing to sealed; resumes what is there."""
    with create(root) as run:
        for rows in ([0, 1], [2]):
            if not set(rows) <= set(run.done_rows().tolist()):
                add(run, rows)
        run.update_manifest(counters={"rows_in": 3})
        run.append_metrics({"rows": 3})
        run.seal(np.arange(3))


@pytest.mark.fault(
    "disk full or EIO",
    injected="the n-th disk operation of a job, for every n",
    outcome="StorageError; the same call completes, each row once",
)
@pytest.mark.parametrize("code", CODES)
def test_a_job_survives_the_failure_of_any_disk_operation(tmp_path: Path, code: int) -> None:
    for fail_at in range(200):
        root = tmp_path / str(fail_at)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, fail_at, code)
            try:
                whole_job(root)
                break
            except (StorageError, RunDirectoryError):
                pass  # which of the two depends on the operation; the state is what counts
        assert not (root / "_SUCCESS").exists() or "replace" in disk.calls[:fail_at]
        if (root / "run.json").exists():
            json.loads((root / "run.json").read_text())
        whole_job(root)
        run = RunDirectory.open(root)
        assert run.is_sealed and run.done_rows().tolist() == [0, 1, 2]
        assert not list(root.rglob("*.tmp"))
    assert fail_at == len(disk.calls) > 30


@pytest.mark.fault(
    "SIGKILL",
    injected="while parts are being written",
    outcome="committed rows are whole; the same call goes on",
)
def test_a_killed_job_resumes(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("spawn")
    process = fork.Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    while not list(tmp_path.glob("data/*.parquet")):
        time.sleep(0.01)
        assert process.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with create(tmp_path) as run:
        done = run.done_rows()
        assert done.tolist() == list(range(len(done))) and len(done) > 0
        assert not list(tmp_path.rglob("*.tmp"))
        run.seal(np.arange(len(done)))


def _write_for_ever(root: Path) -> None:
    with create(root) as run:
        row = 0
        while True:
            add(run, [row])
            row += 1


def test_a_foreign_manifest_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_unsealing_takes_the_mark_and_the_audit_away(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        part = add(run, [0, 1])
        run.seal(np.arange(2))
        run.write_json("audit/summary.json", {"verdict": "pass"})
        run.unseal(with_audit=False)
        assert not run.is_sealed and (tmp_path / "audit" / "summary.json").exists()
        run.seal(np.arange(2))
        run.unseal(with_audit=True)
        assert not run.is_sealed and part.exists()
        assert not list((tmp_path / "audit").iterdir())
