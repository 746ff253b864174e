"""The package that a Python program imports: from a path or a frame to typed results."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import kvcoppice
from tests.tiny_job import PROMPTS, write_prompts

ROOT = Path(__file__).resolve().parents[2]
_ROWS = {"id": [f"r{i}" for i in range(len(PROMPTS))], "prompt": PROMPTS}
_FEW: dict[str, Any] = {"engine": "naive", "dtype": "float32", "max_new_tokens": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


def test_from_a_path_to_answers_an_audit_and_a_report(tmp_path: Path, model_folder: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", list(PROMPTS))
    result = kvcoppice.run(prompts, tmp_path / "out", model=model_folder, **_FEW)
    assert (result.rows, result.rows_ok, result.rows_failed) == (6, 6, 0)
    answers = result.answers()
    assert isinstance(answers, pl.LazyFrame)
    table = answers.collect()
    assert table["id"].to_list() == _ROWS["id"] and table["prompt"].to_list() == PROMPTS
    found = result.audit(audit_sample="100%")
    distinct = len(set(PROMPTS))
    assert found.passed and (found.rows_audited, found.rows_exact) == (distinct, distinct)
    assert found == kvcoppice.audit(str(tmp_path / "out"), audit_sample="100%")
    page = kvcoppice.report(tmp_path / "out").page
    assert page == result.report().page and Path(page).read_text().startswith("<!doctype html>")
    with pytest.raises(FrozenInstanceError):
        result.rows = 7  # type: ignore[misc]


@pytest.mark.parametrize(
    "frame",
    [pl.DataFrame(_ROWS), pl.DataFrame(_ROWS).lazy(), pa.table(_ROWS)],
    ids=["DataFrame", "LazyFrame", "Table"],
)
def test_frames_are_prompts_and_the_same_frame_resumes(
    tmp_path: Path, own_cache: Path, tokenizer_folder: Path, frame: Any
) -> None:
    def run(rows: Any) -> kvcoppice.Run:
        return kvcoppice.run(rows, tmp_path / "out", model=tokenizer_folder, engine="echo")

    assert run(frame).was_complete is False
    (kept,) = own_cache.glob("frames/*/prompts.parquet")
    assert kept.stat().st_mode & 0o077 == 0 and kept.parent.stat().st_mode & 0o077 == 0
    assert run(frame).was_complete is True
    in_pieces = frame if not isinstance(frame, pl.DataFrame) else pl.concat(
        [frame[:2], frame[2:]], rechunk=False
    )  # fmt: skip
    assert run(in_pieces).was_complete is True
    assert run(frame).answers().collect()["generated_text"][0] == PROMPTS[0][::-1]
    with pytest.raises(kvcoppice.UsageError, match="another input"):
        run(pl.DataFrame(_ROWS | {"prompt": PROMPTS[::-1]}))


def test_a_program_retries_what_failed(tmp_path: Path, tokenizer_folder: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", ["a", None])
    settings: dict[str, Any] = {"engine": "echo", "fail_on_error": "1"}
    result = kvcoppice.run(prompts, tmp_path / "out", model=tokenizer_folder, **settings)
    again = result.retry(max_rows=2)
    assert again.was_complete and (again.rows_ok, again.rows_failed) == (1, 1)
    with pytest.raises(kvcoppice.TooManyFailedRows):
        kvcoppice.retry(tmp_path / "out", fail_on_error="0")


def test_frames_that_nobody_used_go(own_cache: Path, tokenizer_folder: Path) -> None:
    import os

    kvcoppice.plan(pl.DataFrame(_ROWS), model=tokenizer_folder, engine="echo")
    (kept,) = own_cache.glob("frames/*")
    os.utime(kept, (0, time.time() - 31 * 24 * 3600))
    kvcoppice.plan(pl.DataFrame(_ROWS).head(2), model=tokenizer_folder, engine="echo")
    assert not kept.exists() and len(list(own_cache.glob("frames/*"))) == 1


def test_a_plan_says_what_sharing_saves(tokenizer_folder: Path) -> None:
    plan = kvcoppice.plan(pl.DataFrame(_ROWS), model=tokenizer_folder, engine="echo")
    total = sum(map(len, PROMPTS))
    assert (plan.rows, plan.rows_rejected, plan.prompt_tokens) == (6, 0, total)
    assert plan.saving == 1 - plan.unique_tokens / total
    assert plan.groups_of_rows().collect().height == 6


def test_a_mistake_is_an_error_of_ours(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(kvcoppice.UsageError, match="did you mean max-new-tokens"):
        kvcoppice.run("p.parquet", tmp_path / "o", model=tokenizer_folder, max_new_token=3)
    with pytest.raises(kvcoppice.UsageError, match="pl.from_pandas"):
        kvcoppice.plan([1, 2], model=tokenizer_folder)
    with pytest.raises(kvcoppice.InputError):
        kvcoppice.plan(tmp_path / "none.parquet", model=tokenizer_folder, engine="echo")
    with pytest.raises(AttributeError, match="kvcoppice has no 'rum'"):
        _ = kvcoppice.rum


def test_the_import_takes_a_moment_and_brings_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import kvcoppice; s = time.perf_counter() - t\n"
        "print(s, [m for m in ('polars', 'pydantic', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]" and float(seconds) < 0.3
