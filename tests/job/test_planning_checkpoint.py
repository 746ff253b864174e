"""A plan that is killed goes on, and comes to the plan that it would have come to."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs import parquet_input
from pipeline.job.job import open_job
from pipeline.job.planning import PlannedJob, plan_rows
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.settings import JobSettings
from tests.job.preparing import fail_after, watch_prepared
from tests.tiny_job import echo_settings, write_prompts

ROWS = 90


@pytest.fixture(autouse=True)
def small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 5 rows, a checkpoint every 20, a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 5)
    monkeypatch.setattr(Checkpoint, "every_rows", 20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    prompts = [None if i % 11 == 3 else f"prompt {i % 7} of {i}" for i in range(ROWS)]
    tenants = ["a" if i // 7 % 2 else None for i in range(ROWS)]
    limits = [3 + i // 3 % 4 for i in range(ROWS)]
    return write_prompts(tmp_path / "p.parquet", prompts, tenant=tenants, max_new_tokens=limits)


def plan(source: Path, settings: JobSettings) -> PlannedJob:
    return plan_rows(open_job(str(source), settings))


def described(planned: PlannedJob) -> tuple[object, ...]:
    return planned.summary, planned.ids.to_list(), planned.rejected, planned.rows.tolist()


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("batches", [3, 4, 9, 17])
def test_an_interrupted_plan_goes_on_where_it_was(
    tmp_path: Path,
    source: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
) -> None:
    """Seen red: rows of the last checkpoint tokenised again, numbers of parameters begun anew."""
    settings = echo_settings(tokenizer_folder)
    whole = described(plan(source, settings))
    assert leftovers(tmp_path) == []
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, batches, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            plan(source, settings)
    saved = batches * 5 // 20 * 20
    prepared = watch_prepared(monkeypatch)
    assert described(plan(source, settings)) == whole
    assert prepared == list(range(saved, ROWS, 5))
    assert leftovers(tmp_path) == []


def test_an_interrupted_plan_writes_nothing_more(
    tmp_path: Path, source: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it lives on, in a traceback. Seen red: what it had not saved made a file that
    was cut short since as long as it should be."""
    settings = echo_settings(tokenizer_folder)
    whole = described(plan(source, settings))
    with monkeypatch.context() as patch:
        fail_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as interrupted:
            plan(source, settings)
    (place,) = (tmp_path / "cache").rglob("tokens.bin")
    place.write_bytes(b"")
    del interrupted
    gc.collect()
    assert place.read_bytes() == b""
    assert described(plan(source, settings)) == whole


def test_a_damaged_or_other_checkpoint_is_not_used(
    tmp_path: Path, source: Path, tokenizer_folder: Path
) -> None:
    settings = echo_settings(tokenizer_folder)
    whole = described(plan(source, settings))
    for name in ("tokens.bin", "rows-00001.parquet", "state.json"):
        with pytest.MonkeyPatch.context() as patch:
            fail_after(patch, 9, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                plan(source, settings)
        (place,) = (tmp_path / "cache").rglob(name)
        place.write_bytes(place.read_bytes()[:7])
        assert described(plan(source, settings)) == whole
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            plan(source, settings)
    os.utime(source, (1, 1))  # other times, but the same content
    with pytest.MonkeyPatch.context() as patch:
        prepared = watch_prepared(patch)
        assert described(plan(source, settings)) == whole
        assert prepared[0] == 40


def test_a_checkpoint_answers_for_no_other_content(
    source: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: replaced under the same size and time, all rows had the old prompts' tokens."""
    settings = echo_settings(tokenizer_folder)
    before = plan_rows(open_job(str(source), settings), keep_rows=True)
    status = source.stat()
    table = pq.read_table(source)
    others = [p and p.replace("prompt", "tpmorp") for p in table["prompt"].to_pylist()]
    names = table.column_names
    pq.write_table(table.set_column(names.index("prompt"), "prompt", pa.array(others)), source)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.stat().st_size == status.st_size
    prepared = watch_prepared(monkeypatch)
    after = plan(source, settings)
    assert prepared[0] == 0 and len(prepared) == ROWS // 5
    assert (
        after.plan.table[0].tolist()
        == before.plan.table[0].tolist()[:6][::-1] + (before.plan.table[0].tolist()[6:])
    )


def test_a_job_does_not_tokenise_what_a_plan_kept(
    tmp_path: Path, source: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: the rows after the last hundred thousand tokenised again; the folder still held."""
    job = open_job(str(source), echo_settings(tokenizer_folder))
    kept = plan_rows(job, keep_rows=True)
    assert "state.json" in leftovers(tmp_path)
    prepared = watch_prepared(monkeypatch)
    assert described(plan_rows(job)) == described(kept) and prepared == []
    assert leftovers(tmp_path) == []
    # What was left to another call, and removed by it, can be read to its end.
    again, table = plan_rows(job).plan.table, kept.plan.table
    assert all(table[row].tolist() == again[row].tolist() for row in range(ROWS))
    assert table.read_words(0, ROWS).tolist() == again.read_words(0, ROWS).tolist()


def test_an_input_at_fault_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["x"] * 40, id=["same"] * 40)
    with pytest.raises(InputError, match="come twice"):
        plan(source, echo_settings(tokenizer_folder))
    assert leftovers(tmp_path) == []


def test_two_plans_of_one_input_do_not_share_a_checkpoint(
    source: Path, tokenizer_folder: Path
) -> None:
    job = open_job(str(source), echo_settings(tokenizer_folder))
    held = Checkpoint.open(job.key())
    assert held is not None and Checkpoint.open(job.key()) is None
    assert len(plan_rows(job).ids) == ROWS
    held.tokens.close()
    held.release()


def test_old_folders_are_dropped(tmp_path: Path, source: Path, tokenizer_folder: Path) -> None:
    old = tmp_path / "cache" / "coppice" / "plans" / "old"
    old.mkdir(parents=True)
    week = time.time() - 8 * 24 * 3600
    os.utime(old, (week, week))
    plan(source, echo_settings(tokenizer_folder))
    assert not old.exists()


_SLOW = """
import sys, time
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.job.prepare import Preparation
from pipeline.inputs import parquet_input
from tests.tiny_job import echo_settings
parquet_input.BATCH_ROWS = 5
Checkpoint.every_rows = 20
whole = Preparation.prepare
def prepare(self, batch):
    time.sleep(0.02)
    print(batch.row_start, flush=True)
    return whole(self, batch)
Preparation.prepare = prepare
plan_rows(open_job(sys.argv[1], echo_settings(sys.argv[2])))
"""


def test_a_killed_process_leaves_a_checkpoint(
    source: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", _SLOW, str(source), str(tokenizer_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 55:
                process.send_signal(signal.SIGKILL)
                break
    prepared = watch_prepared(monkeypatch)
    assert len(plan(source, echo_settings(tokenizer_folder)).ids) == ROWS
    assert prepared[0] == 40
