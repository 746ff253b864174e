"""Frames and relations in, answered ones out; what is the same is not computed again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest

import kvcoppice
from pipeline.engine.echo_engine import EchoEngine
from tests.tiny_job import PROMPTS

ROOT = Path(__file__).resolve().parents[2]
ROWS: dict[str, Any] = {
    "score": [3, 1, 2, 5, 4, 0],
    "prompt": PROMPTS,
    "id": [f"r{i}" for i in range(len(PROMPTS))],
}
ECHOED = [text[::-1] for text in PROMPTS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sequences that an engine was given, by call."""
    counts: list[int] = []
    real = EchoEngine.generate

    def generate(engine: EchoEngine, plan: Any, sequences: Any, *rest: Any) -> Any:
        counts.append(len(sequences))
        return real(engine, plan, sequences, *rest)

    monkeypatch.setattr(EchoEngine, "generate", generate)
    yield counts


def ask(rows: Any, model: Path, output: Any = None, **settings: Any) -> Any:
    return kvcoppice.frame(rows, output, model=model, engine="echo", **settings)


@pytest.mark.parametrize(
    "rows",
    [pl.DataFrame(ROWS), pl.DataFrame(ROWS).lazy(), pa.table(ROWS)],
    ids=["DataFrame", "LazyFrame", "Table"],
)
def test_a_frame_comes_back_answered(rows: Any, tokenizer_folder: Path) -> None:
    answered = ask(rows, tokenizer_folder)
    assert type(answered) is type(rows)
    table = pl.from_arrow(answered) if isinstance(answered, pa.Table) else answered.lazy().collect()
    assert isinstance(table, pl.DataFrame)
    assert table.columns[:3] == ["score", "prompt", "id"]
    assert table.select("score", "prompt", "id").equals(pl.DataFrame(ROWS))
    assert table["generated_text"].to_list() == ECHOED


def test_the_same_frame_is_computed_once_and_another_is_a_run_of_its_own(
    tokenizer_folder: Path, own_cache: Path, computed: list[int]
) -> None:
    frame = pl.DataFrame(ROWS)
    first = ask(frame, tokenizer_folder)
    num = len(computed)
    assert num > 0
    in_pieces = pl.concat([frame[:2], frame[2:]], rechunk=False)
    assert ask(in_pieces, tokenizer_folder).equals(first)
    assert ask(frame, tokenizer_folder, threads=1, rows_per_part=3).equals(first)
    assert len(computed) == num
    ask(frame, tokenizer_folder, max_new_tokens=2)
    assert len(computed) > num and len(list(own_cache.glob("frames/*/runs/*"))) == 2
    changed = ask(frame.with_columns(prompt=pl.lit("abc")), tokenizer_folder)
    assert changed["generated_text"].to_list() == ["cba"] * 6
    assert len(list(own_cache.glob("frames/*"))) == 2


def test_a_folder_of_your_own_refuses_another_frame(tmp_path: Path, tokenizer_folder: Path) -> None:
    frame = pl.DataFrame(ROWS)
    assert ask(frame, tokenizer_folder, tmp_path / "out")["generated_text"].to_list() == ECHOED
    assert ask(frame, tokenizer_folder, tmp_path / "out").height == 6
    with pytest.raises(kvcoppice.UsageError, match="another input"):
        ask(frame.head(2), tokenizer_folder, tmp_path / "out")


def test_a_notebook_that_was_killed_goes_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    """kill -9 when half of the parts are written."""
    code = (
        "import os, signal, sys, polars as pl, kvcoppice\n"
        "from pipeline.storage import run_directory\n"
        "real, parts = run_directory.write_part, []\n"
        "def write(*given):\n"
        "    parts.append(real(*given))\n"
        "    if len(parts) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return parts[-1]\n"
        "run_directory.write_part = write\n"
        "rows = pl.read_parquet(sys.argv[1])\n"
        "kvcoppice.frame(rows, model=sys.argv[2], engine='echo', rows_per_part=1)\n"
    )
    pl.DataFrame(ROWS).write_parquet(tmp_path / "rows.parquet")
    arguments = [sys.executable, "-c", code, str(tmp_path / "rows.parquet"), str(tokenizer_folder)]
    done = subprocess.run(arguments, cwd=ROOT, env=dict(os.environ), capture_output=True)
    assert done.returncode == -9, done.stderr
    from pipeline.storage import part_file, run_directory

    written: list[int] = []

    def write_part(folder: Path, number: int, table: Any, provenance: Any) -> Path:
        written.append(table.num_rows)
        return part_file.write_part(folder, number, table, provenance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "write_part", write_part)
        answered = ask(
            pl.read_parquet(tmp_path / "rows.parquet"), tokenizer_folder, rows_per_part=1
        )
    assert answered["generated_text"].to_list() == ECHOED
    assert sum(written) == 4


def test_runs_of_frames_that_nobody_used_go(tokenizer_folder: Path, own_cache: Path) -> None:
    ask(pl.DataFrame(ROWS), tokenizer_folder)
    (kept,) = own_cache.glob("frames/*")
    os.utime(kept, (0, time.time() - 31 * 24 * 3600))
    ask(pl.DataFrame(ROWS).head(2), tokenizer_folder)
    assert not kept.exists()


def test_a_column_that_is_called_like_ours_keeps_its_values(tokenizer_folder: Path) -> None:
    frame = pl.DataFrame({"status": ["new", "old"], "prompt": ["ab", "cd"]})
    answered = ask(frame, tokenizer_folder)
    assert answered.columns[:2] == ["input_status", "prompt"]
    assert answered["input_status"].to_list() == ["new", "old"]
    assert answered["status"].to_list() == ["ok", "ok"]


# DuckDB.


def relate(rows: Any, model: Path, output: Any = None, **settings: Any) -> Any:
    return kvcoppice.relation(rows, output, model=model, engine="echo", **settings)


def test_a_relation_comes_back_answered_in_its_connection(
    tmp_path: Path, tokenizer_folder: Path, computed: list[int]
) -> None:
    with duckdb.connect() as connection:
        connection.execute('CREATE TABLE mine (id TEXT, prompt TEXT, "it\'s" INTEGER)')
        connection.execute("INSERT INTO mine VALUES ('a', 'abc', 1), ('b', 'def', 2)")
        rows = connection.sql("SELECT * FROM mine ORDER BY id DESC")
        answered = relate(rows, tokenizer_folder)
        assert answered.columns[:3] == ["id", "prompt", "it's"]
        found = answered.project('id, generated_text, "it\'s"').fetchall()
        assert found == [("b", "fed", 2), ("a", "cba", 1)]
        num = len(computed)
        again = relate(connection.sql("SELECT * FROM mine ORDER BY id DESC"), tokenizer_folder)
        joined = again.join(connection.table("mine").set_alias("m"), "id").count("*").fetchall()
        assert joined == [(2,)] and len(computed) == num
        own = relate(rows, tokenizer_folder, tmp_path / "it's" / "out")
        assert own.count("*").fetchall() == [(2,)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: relate(pl.DataFrame(ROWS), m), "rows are a relation of DuckDB"),
        (lambda m: ask("rows.parquet", m), "rows are a frame here; kvcoppice.run takes the path"),
        (lambda m: ask([1], m), "prompts are a path, a polars frame or a pyarrow table"),
        (lambda m: relate(duckdb.sql("SELECT 'a' AS prompt"), m, "s3://b/out"), "is elsewhere"),
        (lambda m: ask(pl.DataFrame({"text": ["a"]}), m), "neither a column 'prompt'"),
        (lambda m: ask(pl.DataFrame(ROWS).clear(), m), "holds no rows"),
        (lambda m: ask(pl.DataFrame(ROWS), m, tempratur=1), "tempratur"),
    ],
)
def test_a_mistake_is_one_sentence(tokenizer_folder: Path, call: Any, says: str) -> None:
    with pytest.raises(kvcoppice.UsageError, match=says) as error:
        call(tokenizer_folder)
    assert "\n" not in str(error.value)
