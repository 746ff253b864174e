"""An input that changes under a job, or is not text: one error, nothing half done, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import run as run_module
from pipeline.engine.base import EngineFactory
from pipeline.engine.load import make_engine
from pipeline.errors import InputError, RunDirectoryError
from pipeline.inputs import parquet_input
from pipeline.job.job import Job, open_job
from pipeline.job.planning import plan_rows
from pipeline.job.prepare import Preparation
from pipeline.job.prepared_batch import PreparedBatch
from pipeline.prompts import PromptBatch
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import FailingEngine, answers, on, write_prompts

ROWS = 60
Act = Callable[[Path], object]


def other_rows(path: Path) -> None:
    """Other prompts of the same lengths."""
    write_prompts(path, [f"q{i:03}" for i in range(ROWS)])


def replace(path: Path) -> None:
    other_rows(path.with_name("new"))
    os.replace(path.with_name("new"), path)


ACTS: dict[str, Act] = {
    "replaced": replace,
    "written over": other_rows,
    "cut": lambda path: os.truncate(path, 100),
    "deleted": Path.unlink,
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen batches, few of which are read ahead."""
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "in.parquet", [f"p{i:03}" for i in range(ROWS)])


def act_after_opening(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> EngineFactory:
    def open_and_act(input: str, settings: JobSettings) -> Job:
        job = open_job(input, settings)
        act()
        return job

    monkeypatch.setattr(run_module, "open_job", open_and_act)
    return make_engine


def act_between_batches(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> EngineFactory:
    whole = Preparation.prepare

    def prepare(self: Preparation, batch: PromptBatch) -> PreparedBatch:
        if batch.row_start == 10:
            act()
        return whole(self, batch)

    monkeypatch.setattr(Preparation, "prepare", prepare)
    return make_engine


def act_while_answering(_: pytest.MonkeyPatch, act: Callable[[], object]) -> EngineFactory:
    return on(FailingEngine(20, act))


PHASES = [act_after_opening, act_between_batches, act_while_answering]


@pytest.mark.fault(
    "input that changes during a run",
    injected="replaced, written over, cut or deleted while rows are answered",
    outcome="exit code 2; with the old file back the same command resumes",
)
@pytest.mark.parametrize("change", ACTS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_file_that_changes_ends_the_job_and_its_return_resumes_it(
    tmp_path: Path,
    source: Path,
    settings: JobSettings,
    phase: Callable[..., EngineFactory],
    change: str,
) -> None:
    """Seen red: a change between two batches that no later read would have met."""
    before, out = source.read_bytes(), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        engines = phase(patch, lambda: ACTS[change](source))
        with pytest.raises(InputError, match=r"in\.parquet") as caught:
            run_job(str(source), out, settings, make_engine=engines)
    assert caught.value.exit_code == 2
    assert out.exists() is (phase is act_while_answering)
    if out.exists():
        written = answers(out) if list((out / "data").iterdir()) else None
        assert written is None or set(written["prompt"]) <= {f"p{i:03}" for i in range(ROWS)}
        assert not (out / "_SUCCESS").exists()
        if change in ("replaced", "written over"):
            with pytest.raises(RunDirectoryError, match="another input"):
                run_job(str(source), out, settings)
    source.write_bytes(before)
    assert not run_job(str(source), out, settings).was_complete
    assert answers(out)["prompt"].to_list() == [f"p{i:03}" for i in range(ROWS)]


@pytest.mark.fault(
    "input that changes during a run",
    injected="replaced or written over between two batches of the plan",
    outcome="named, exit code 2",
)
@pytest.mark.parametrize("change", ACTS)
def test_a_plan_is_not_made_of_two_files(
    source: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A plan reads each column once: only what it saw at the end can tell."""
    job = open_job(str(source), settings)
    act_between_batches(monkeypatch, lambda: ACTS[change](source))
    with pytest.raises(InputError, match=r"in\.parquet"):
        plan_rows(job)


def test_a_folder_that_gains_a_file_is_another_input(tmp_path: Path, settings: JobSettings) -> None:
    """Not for the job that is open, but for every later one: it would have other rows."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_prompts(folder / "b.parquet", ["one", "two"])
    added = {"id": ["x"]}
    with pytest.MonkeyPatch.context() as patch:
        act_after_opening(patch, lambda: write_prompts(folder / "a.parquet", ["zero"], **added))
        run_job(str(folder), out, settings)
    assert answers(out)["prompt"].to_list() == ["one", "two"]
    with pytest.raises(RunDirectoryError, match="another input"):
        run_job(str(folder), out, settings)
    (folder / "a.parquet").unlink()
    assert run_job(str(folder), out, settings).was_complete


def not_utf8() -> pa.Array:
    offsets = pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])


@pytest.mark.parametrize("column", ["prompt", "carried"])
def test_bytes_that_are_not_text_stop_the_job_before_it_begins(
    tmp_path: Path, settings: JobSettings, column: str
) -> None:
    columns = {"id": ["a", "b"], "prompt": ["one", "two"], "carried": ["x", "y"]}
    pq.write_table(pa.table({**columns, column: not_utf8()}), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"in\.parquet is damaged .*UTF8"):
        run_job(str(tmp_path / "in.parquet"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_json_that_is_not_text_is_named_by_its_line(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2 of .*in\.jsonl is not a JSON object in UTF-8"):
        run_job(str(tmp_path / "in.jsonl"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_json_that_is_too_deep_is_named_by_its_line(tmp_path: Path, settings: JobSettings) -> None:
    """Seen red: "is not a JSON object in UTF-8", which it is."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "x": ' + "[" * 9000 + "]" * 9000 + "}\n")
    with pytest.raises(InputError, match=r"line 1 of .*in\.jsonl has lists or objects too deep"):
        run_job(str(tmp_path / "in.jsonl"), tmp_path / "out", settings)


def test_control_token_strings_are_text_like_any_other(
    tmp_path: Path, settings: JobSettings
) -> None:
    """`<eos>` in a row is five characters, not the end of anything."""
    source = write_prompts(tmp_path / "in.parquet", ["a<eos>", "<eos>", "ab"])
    run_job(str(source), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["prompt_tokens"].to_list() == [6, 5, 2]
    assert rows["prompt"].to_list() == ["a<eos>", "<eos>", "ab"]
    assert rows["status"].to_list() == ["ok"] * 3
