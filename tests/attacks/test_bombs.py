"""A few bytes of input that stand for gigabytes: answered or refused, with bounded memory."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, ModelError
from pipeline.inputs import line_reader
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.tokens.loading import load_tokenizer
from tests.tiny_job import answers, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
_MOST_MIB = 2500  # some 450 of it are Python with its libraries, 1,000 the part that is written
_RUN = """
import sys
from pathlib import Path
from pipeline.errors import CoppiceError
from pipeline.run import run_job
from pipeline.settings import JobSettings
flat = {"model": sys.argv[3], "engine": "echo", "max_new_tokens": 4, "fail_on_error": "4000"}
try:
    run_job(sys.argv[1], Path(sys.argv[2]), JobSettings.from_flat(flat | {"rows_per_part": 500}))
except CoppiceError as error:
    print(type(error).__name__, error)
print(Path("/proc/self/status").read_text())
"""


def run(source: Path, tmp_path: Path, model: Path) -> tuple[str, int]:
    """What a job in a process of its own says, and its peak in MiB."""
    command = [sys.executable, "-c", _RUN, str(source), str(tmp_path / "out"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None
    return done.stdout, int(peak[1]) // 1024


@pytest.mark.fault(
    "bombs",
    injected="3 KB of Parquet: a value of 1 MB that all 4,000 rows share",
    outcome="carried, or refused row by row as a prompt; memory bounded",
)
@pytest.mark.slow
@pytest.mark.parametrize("column", ["prompt", "note"])
def test_a_dictionary_of_one_large_value(tmp_path: Path, column: str) -> None:
    """Seen red: 8.4 GB, since 2,048 rows were decoded at once and row groups were kept whole."""
    columns: dict[str, Any] = {"id": [f"r{i}" for i in range(4000)], "prompt": ["hi"] * 4000}
    columns[column] = ["a" * 1_000_000] * 4000
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", compression="zstd")
    assert (tmp_path / "in.parquet").stat().st_size < 50_000
    _, peak = run(tmp_path / "in.parquet", tmp_path, ROOT / "data" / "demo_model")
    status = "error" if column == "prompt" else "ok"
    assert answers(tmp_path / "out")["status"].to_list() == [status] * 4000
    assert peak < _MOST_MIB


_TEXTS = ["a" * 100_000] * 3000
_BIG: dict[str, Callable[[], pa.Array]] = {  # 300 MB each, and made when they are wanted
    "text": lambda: pa.array(_TEXTS),
    "nested": lambda: pa.array([[{"role": "user", "content": text}] for text in _TEXTS]),
    "fixed width": lambda: pa.array([b"a" * 100_000] * 3000, pa.binary(100_000)),
    "dictionary": lambda: pa.array(_TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [*((kind, "dictionary") for kind in _BIG), ("text", "DELTA_BYTE_ARRAY")],
)
def test_no_slice_of_a_file_is_large(tmp_path: Path, kind: str, encoding: str) -> None:
    """300 MB of a few KB, and rows that come back as they were written."""
    table = pa.table({"prompt": ["p"] * 3000, "x": _BIG[kind]()})
    path = tmp_path / "in.parquet"
    if encoding == "dictionary":
        pq.write_table(table, path, compression="zstd")
    else:
        pq.write_table(
            table, path, compression="zstd", use_dictionary=False, column_encoding={"x": encoding}
        )
    del table
    assert path.stat().st_size < 200_000
    (file,) = open_source(Location(path), ReadSettings())._files
    before = pa.total_allocated_bytes()
    rows = 0
    for batch in file.iter_batches(["x"], 3000):
        assert batch.nbytes <= 33 << 20
        assert pa.total_allocated_bytes() - before < 400 << 20
        rows += batch.num_rows
    assert rows == 3000
    assert pa.total_allocated_bytes() - before < 100 << 20


def test_rows_of_a_block_that_is_not_kept_are_the_same(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"{i} " * 20_000 for i in range(600)]})
    pq.write_table(table, tmp_path / "in.parquet", compression="zstd", row_group_size=250)
    opened = open_source(Location(tmp_path / "in.parquet"), ReadSettings())
    wanted = pa.array([599, 0, 3, 3, 251, 250, 249])
    kept = opened.take(wanted.to_numpy())
    object.__setattr__(opened._files[0], "num_bytes", 0)
    from pipeline.inputs import parquet_input

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_input, "_MOST_KEPT_BYTES", 1000)
        opened._cache._tables.clear()
        opened._cache.num_bytes = 0
        passing = opened.take(wanted.to_numpy())
        assert opened._cache.num_bytes == 0
    assert passing.equals(kept) and kept.equals(table.take(wanted).cast(kept.schema))


def lines(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


@pytest.mark.fault(
    "bombs",
    injected="0.3 MB of .jsonl.gz: a line of 300 MB; a line of 12 million lists",
    outcome="InputError naming the line, before it is parsed",
)
@pytest.mark.parametrize(
    ("head", "unit", "times", "tail", "said"),
    [
        (b'{"prompt": "', b"a", 300_000_000, b'"}', "line 1 of .* is longer than 268,435,456"),
        (
            b'{"prompt": "a", "x": [',
            b"[],",
            12_000_000,
            b"0]}",
            "line 1 of .* 10,000,000 values",
        ),
    ],
    ids=["long", "many values"],
)
def test_a_line_that_unfolds(
    tmp_path: Path, head: bytes, unit: bytes, times: int, tail: bytes, said: str
) -> None:
    """Seen red: 7.5 GB and abort."""
    path = lines(tmp_path / "in.jsonl.gz", head + unit * times + tail)
    with pytest.raises(InputError, match=said):
        open_source(Location(path), ReadSettings(), copies=ParquetCopies(tmp_path / "cache"))


def test_lines_that_share_no_field_take_no_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten fields of their own in each of 3,000 lines would make 90 million cells."""
    monkeypatch.setattr(line_reader, "_MOST_FIELDS", 40_000)
    rows = [{"prompt": "a"} | {f"k{i}-{j}": j for j in range(10)} for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opened = open_source(
        Location(tmp_path / "in.jsonl"), ReadSettings(), copies=ParquetCopies(tmp_path / "cache")
    )
    assert opened.num_rows == 300 and len(opened.schema) == 3001
    monkeypatch.setattr(line_reader, "_MOST_FIELDS", 2000)
    with pytest.raises(InputError, match="over 2,000 different fields by line 200"):
        open_source(
            Location(tmp_path / "in.jsonl"), ReadSettings(), copies=ParquetCopies(tmp_path / "c2")
        )


def bomb(folder: Path, field: str) -> Path:
    """A tokenizer that makes ten letters of one, ten times over."""
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    steps = {"normalizer": "normalizers", "decoder": "decoders"}[field]
    content[field] = {"type": "Sequence", steps: [step] * 10}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.fault(
    "bombs",
    injected="a tokenizer whose normaliser, or decoder, makes ten letters of one ten times over",
    outcome="ModelError before a text is met",
)
@pytest.mark.parametrize("field", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_endless(tmp_path: Path, field: str) -> None:
    """Seen red: 5.3 GB and abort."""
    with pytest.raises(ModelError, match=r"may make a text 1e\+10 times as long"):
        load_tokenizer(str(bomb(tmp_path / "model", field)), None)


def test_a_text_that_takes_gigabytes_to_tokenise_is_its_rows_error(tmp_path: Path) -> None:
    """Of a tokenizer that no bound is known of. Seen red: 12 GB for 100 MB."""
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "prompt": ["x" * 40_000_000, "hello"]}), path)
    said, peak = run(path, tmp_path, write_tokenizer(tmp_path / "model"))
    rows = answers(tmp_path / "out")
    assert rows["error_type"].to_list() == ["BadPrompt", None], said
    assert "40,000,000 characters" in rows.filter(pl.col("id") == "a")["error_message"][0]
    assert peak < 1500
