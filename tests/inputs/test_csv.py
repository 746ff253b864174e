"""CSV files as input: quoting, encodings, types, and each bad row by the line where it begins."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.inputs import csv_file
from pipeline.inputs.conversion import convert
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.inputs.text_files import write_rows
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "_ROWS_AT_A_TIME", 3)


def opened(path: Path, tmp_path: Path, **read: Any) -> PromptSource:
    copies = ParquetCopies(tmp_path / "cache" / "inputs")
    return open_source(Location(path), ReadSettings(**read), copies=copies)


def rows(source: PromptSource) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = source.take(np.arange(source.num_rows)).to_pylist()
    return found


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_cells_are_those_that_were_written(tmp_path: Path) -> None:
    text = 'id,prompt,note\r\na,"x, ""y""\nz",\r\n\r\nb, w ,"é"\r\n'
    source = opened(write(tmp_path / "in.csv", text), tmp_path)
    assert rows(source) == [
        {"id": "a", "prompt": 'x, "y"\nz', "note": None},
        {"id": "b", "prompt": " w ", "note": "é"},
    ]
    ids = [name for batch in source.iter_prompts() for name in batch.ids]
    assert ids == ["a", "b"]


def test_without_an_id_rows_are_named_by_their_number(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "in.csv", "prompt\n" + "p\n" * 5), tmp_path)
    ids = [name for batch in source.iter_prompts() for name in batch.ids]
    assert ids == [f"in.csv:0:{row}" for row in range(5)]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["7", "-12", "", "0"], pa.int64()),
        (["0.5", "-2.25", ""], pa.float64()),
        (["007", "8"], pa.large_string()),
        (["0.50", "0.25"], pa.large_string()),
        (["1", "2", "3", "4", "x"], pa.large_string()),  # said by the last batch alone
        (["+1"], pa.large_string()),
        (["-0"], pa.large_string()),
        (["1e5"], pa.large_string()),
        (["9" * 18], pa.int64()),
        (["9" * 19], pa.large_string()),
        (["true", "false"], pa.large_string()),
        (["2026-11-28"], pa.large_string()),
        (["NA", "null", "nan"], pa.large_string()),
        (["", ""], pa.null()),
    ],
)
def test_a_type_is_taken_only_where_it_loses_nothing(
    tmp_path: Path, cells: list[str], kind: pa.DataType
) -> None:
    lines = [f"p,{cell}" for cell in cells]
    source = opened(write(tmp_path / "in.csv", "\n".join(["prompt,x", *lines])), tmp_path)
    assert source.schema.field("x").type == kind
    back = [row["x"] for row in rows(source)]
    assert ["" if value is None else str(value) for value in back] == cells


def test_what_is_taken_for_text_or_a_number_is_so_however_it_is_written(tmp_path: Path) -> None:
    header = "id,prompt,temperature,max_new_tokens,ignore_eos,stop,seed"
    source = opened(write(tmp_path / "in.csv", f"{header}\n1,2,0.70,008,TRUE,5,\n"), tmp_path)
    (row,) = rows(source)
    assert row == {
        "id": "1", "prompt": "2", "temperature": 0.7, "max_new_tokens": 8.0, "ignore_eos": True,
        "stop": "5", "seed": None,
    }  # fmt: skip
    (batch,) = source.iter_prompts()
    assert batch.overrides == [
        {"temperature": 0.7, "max_new_tokens": 8, "ignore_eos": True, "stop": ("5",)}
    ]


def test_a_column_that_a_flag_names_is_text(tmp_path: Path) -> None:
    """Seen red: 'has the type int64, not string'."""
    path = write(tmp_path / "in.csv", "question,key\n12,7\n13,8\n")
    source = opened(path, tmp_path, prompt_column="question")
    assert [text for batch in source.iter_prompts() for text in batch.contents] == ["12", "13"]
    assert source.schema.field("key").type == pa.int64()


def test_messages_are_json_in_a_cell(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'say "hi", please'}]
    sink = io.StringIO()
    csv.writer(sink).writerows([["id", "messages"], ["a", json.dumps(messages)]])
    source = opened(write(tmp_path / "in.csv", sink.getvalue()), tmp_path)
    (batch,) = source.iter_prompts()
    assert batch.contents == [messages]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", "\ufeffid,prompt\na,é\n".encode()),
        ("in.csv", "id,prompt\na,é\n".encode("utf-16")),
        ("in.csv.gz", gzip.compress("id,prompt\na,é\n".encode(), mtime=0)),
        ("in.csv", "id;prompt\na;é\n".encode()),
        ("in.tsv", "id\tprompt\na\té\n".encode()),
        ("in.csv", 'id|"prompt"\r\n"a"|"é"\r\n'.encode()),
    ],
)
def test_marks_encodings_and_delimiters(tmp_path: Path, name: str, content: bytes) -> None:
    source = opened(write(tmp_path / name, content), tmp_path)
    assert rows(source) == [{"id": "a", "prompt": "é"}]


def test_a_bad_row_is_its_own_error_and_the_others_run(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = 'id,prompt\na,abc\nb,c,d\nc,"x\ny"\n"d"e,f\ne,efg\nf\n'
    run_job(str(write(tmp_path / "in.csv", text)), tmp_path / "out", _lenient(settings))
    found = answers(tmp_path / "out")
    assert found["status"].to_list() == ["ok", "error", "ok", "error", "ok", "error"]
    assert found["generated_text"].to_list() == ["cba", None, "y\nx", None, "gfe", None]
    said = found["error_message"].to_list()
    assert "line 3 of" in said[1] and "has 3 cells where the header has 2" in said[1]
    assert "line 6 of" in said[3] and "text behind a quoted cell" in said[3]
    assert "line 8 of" in said[5] and "has 1 cell where the header has 2" in said[5]
    assert set(found["error_type"].to_list()) == {None, "BadRequest"}


def _lenient(settings: JobSettings) -> JobSettings:
    write = settings.write.model_copy(update={"fail_on_error": "100%"})
    return settings.model_copy(update={"write": write})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no header in its first line"),
        (b"\n\nprompt\nx\n", "has no header in its first line"),
        (b"prompt\n", "holds no rows"),
        (b"id,prompt,id\na,b,c\n", "has the column 'id' twice"),
        (b"id,prompt\na,b\nc,caf\xe9\n", "line 3 of .*in.csv is not text in UTF-8; convert the"),
        (b"caf\xe9,prompt\na,b\n", "line 1 of .*in.csv is not text"),
        (b'id,prompt\na,"b\nc,d\n', "row that begins in line 2 .* has a quote that does not end"),
        (b"id,prompt\na,b,c\nd\n", "line 2 of .* has 3 cells where the header has 2"),
        (b"text\nx\n", "has neither a column 'prompt' nor 'messages'"),
        ("id,prompt\na,é\n".encode("utf-16")[:-1], "in.csv is damaged"),
    ],
)  # fmt: skip
def test_a_file_that_is_at_fault_is_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        opened(write(tmp_path / "in.csv", content), tmp_path)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_a_column_without_a_name_gets_its_number(tmp_path: Path) -> None:
    """As pandas writes its index."""
    source = opened(write(tmp_path / "in.csv", ",prompt\n0,p\n"), tmp_path)
    assert rows(source) == [{"column_1": 0, "prompt": "p"}]


def test_files_of_a_folder_have_one_type_or_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.csv", "prompt,zip,n\np,8005,1\n")
    write(folder / "b.csv", "prompt,zip,n\nq,08005,2\n")
    source = opened(folder, tmp_path)
    assert rows(source) == [
        {"prompt": "p", "zip": "8005", "n": 1},
        {"prompt": "q", "zip": "08005", "n": 2},
    ]


def test_convert_makes_parquet_and_refuses_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", "id,prompt\na,b\n")
    assert convert(Location(path), Location(tmp_path / "out.parquet")) == 1
    write(path, "id,prompt\na,b\nc\n")
    with pytest.raises(InputError, match="line 3 of"):
        convert(Location(path), Location(tmp_path / "other.parquet"))
    assert not (tmp_path / "other.parquet").exists()


@pytest.mark.parametrize(
    "row",
    [
        "x" * 2000,
        '"' + "x\n" * 1000,
        '"' + '","'.join(["x\n" * 20] * 100) + '"',
    ],
    ids=["line", "cell", "cells"],
)
def test_a_row_without_end_takes_no_memory_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    monkeypatch.setattr("pipeline.inputs.csv_rows.LONGEST", 1000)
    with pytest.raises(InputError, match="begins in line 2 of .* is longer than 1,000 characters"):
        opened(write(tmp_path / "in.csv", "prompt\n" + row), tmp_path)


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=9))
def test_what_a_writer_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("prompt", "id"), *table])
    sink = io.BytesIO()
    write_rows(InputFile.local(folder / "in.csv"), sink, as_text=("prompt", "id"))
    import pyarrow.parquet as pq

    found = pq.read_table(sink).to_pylist()
    assert [(row["prompt"] or "", row["id"] or "") for row in found] == table
