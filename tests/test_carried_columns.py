"""Columns of every type go through plan and run and come out as they were, whatever the groups."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, echo_settings

_BIG = Decimal("-99999999999999999999.99")
COLUMNS: dict[str, pa.Array] = {
    "dictionary": pa.array(["a", "b", None, "a"]).dictionary_encode(),
    "nested_dictionary": pa.array(
        [["a"], ["b", None], None, []], pa.list_(pa.dictionary(pa.int32(), pa.string()))
    ),
    "large_string": pa.array(["a", "é\0", None, ""], pa.large_string()),
    "string_view": pa.array(["a", "b" * 50, None, ""], pa.string_view()),
    "binary": pa.array([b"\xff\0", b"", None, b"x"]),
    "binary_view": pa.array([b"\xff\0", b"", None, b"x" * 40], pa.binary_view()),
    "fixed_binary": pa.array([b"ab", b"cd", None, b"ef"], pa.binary(2)),
    "list": pa.array([[1], [], None, [2, None]]),
    "list_view": pa.array([[1], [], None, [2, None]], pa.list_view(pa.int64())),
    "full_list_view": pa.array([[1], [], [3, 4], [2]], pa.list_view(pa.int64())),
    "large_list_view": pa.array([["1"], [], None, ["2"]], pa.large_list_view(pa.string())),
    "fixed_list": pa.array([[1, 2], [3, 4], None, [5, None]], pa.list_(pa.int64(), 2)),
    "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}, {"a": 2, "b": []}]),
    "list_of_structs": pa.array([[{"a": "1"}], [], None, [None, {"a": "2"}]]),
    "map": pa.array(
        [[("a", [1])], [], None, [("b", None), ("c", [])]],
        pa.map_(pa.string(), pa.list_(pa.int64())),
    ),
    "decimal": pa.array([Decimal("1.50"), None, _BIG, Decimal(0)], pa.decimal128(38, 2)),
    "wide_decimal": pa.array([Decimal("1.50"), None, _BIG, Decimal(0)], pa.decimal256(38, 2)),
    "nanoseconds": pa.array([1, None, -3, 2**60], pa.timestamp("ns", "Europe/Berlin")),
    "milliseconds": pa.array([1, None, -3, 2**40], pa.timestamp("ms")),
    "date": pa.array([1, None, -3, 4], pa.date32()),
    "time": pa.array([1, None, 3, 4], pa.time64("ns")),
    "duration": pa.array([1, None, 3, 4], pa.duration("us")),
    "half": pa.array([1.5, None, float("inf"), -0.0], pa.float16()),
    "not_a_number": pa.array([1.5, None, float("nan"), float("-inf")]),
    "uint64": pa.array([2**64 - 1, None, 0, 1], pa.uint64()),
    "boolean": pa.array([True, None, False, True]),
    "null": pa.nulls(4),
}


def write(path: Path, groups: Sequence[int], **columns: Any) -> Path:
    """Row groups of these many rows, 0 among them if asked for."""
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for rows in groups:
            writer.write_table(
                pa.Table.from_batches(table.slice(start, rows).to_batches(), table.schema)
            )
            start += rows
    assert start == table.num_rows
    return path


def written(output: Path) -> pa.Table:
    parts = sorted((output / "data").iterdir())
    return pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("row_index")


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("wide", pa.array([Decimal(1)], pa.decimal256(60, 2)), "'wide' .*which the output cannot"),
        ("zone", pa.array([1], pa.timestamp("us", "Mars/X")), "'zone' .*which the output cannot"),
        ("a\0b", pa.array(["x"]), "has a name with a NUL character"),
        ("inner", pa.array([{"a\0b": 1}]), "'inner' .*has a name with a NUL character"),
    ],
)
def test_what_polars_panics_over_is_one_sentence(
    tmp_path: Path, name: str, column: pa.Array, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seen red: a hundred lines of a Rust backtrace; and the second text with such a name ran."""
    source = write(tmp_path / "in.parquet", [1], prompt=["p"], text=["x"], **{name: column})
    with pytest.raises(InputError, match=says):
        open_source(Location(source), ReadSettings())
    assert "panicked" not in capfd.readouterr().err


def values(column: pa.ChunkedArray) -> str:
    """Comparable also where Python has no such value, or one that does not equal itself."""
    is_time = pa.types.is_timestamp(column.type) or pa.types.is_time64(column.type)
    return repr(column.cast(pa.int64()).to_pylist() if is_time else column.to_pylist())


@pytest.mark.parametrize("groups", [[4], [1, 1, 1, 1], [0, 3, 0, 0, 1, 0]])
def test_columns_of_every_type_come_out_as_they_were(
    tmp_path: Path, settings: JobSettings, groups: list[int]
) -> None:
    """Seen red: no kernel for binary views, a panic over list views when all rows were answered,
    dictionaries in lists over two row groups."""
    prompts = ["one", "two", None, "two"]
    source = write(tmp_path / "in.parquet", groups, prompt=prompts, **COLUMNS)
    expected = pq.read_table(source)
    run_job(str(source), tmp_path / "out", settings)
    assert run_job(str(source), tmp_path / "out", settings).was_complete
    found = written(tmp_path / "out")
    for name in COLUMNS:
        assert values(found.column(name)) == values(expected.column(name)), name
    places = [(group, row) for group, rows in enumerate(groups) for row in range(rows)]
    assert found["id"].to_pylist() == [f"in.parquet:{group}:{row}" for group, row in places]
    assert answers(tmp_path / "out")["status"].to_list() == ["ok", "ok", "error", "ok"]


def test_a_dot_in_a_name_is_part_of_it(tmp_path: Path, settings: JobSettings) -> None:
    """Arrow takes `a.b` for the field of a column `a` as well."""
    dotted = {"a.b": ["x", "y"], "a": [{"b": "1", "c": "2"}, {"b": "3", "c": "4"}]}
    source = write(tmp_path / "in.parquet", [2], prompt=["one", "two"], **dotted)
    options = ReadSettings(prompt_column="a.b")
    (batch,) = open_source(Location(source), options).iter_prompts()
    assert batch.contents == ["x", "y"]
    run_job(str(source), tmp_path / "out", settings)
    assert {name: written(tmp_path / "out")[name].to_pylist() for name in dotted} == dotted


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([Decimal(1)], pa.decimal256(60, 2)), "decimal256"),
        (pa.array([{"a": [1]}], pa.struct([("a", pa.list_view(pa.int64()))])), "list_view"),
        (pa.array([[[1]]], pa.list_(pa.large_list_view(pa.int64()))), "large_list_view"),
    ],
)
def test_what_the_output_cannot_carry_is_refused_before_the_run(
    tmp_path: Path, column: pa.Array, kind: str
) -> None:
    """Polars could not count the finished rows: the run would never be complete."""
    source = write(tmp_path / "in.parquet", [1], prompt=["p"], odd=column)
    with pytest.raises(InputError, match=f"'odd' of .*in.parquet has the type .*{kind}"):
        open_source(Location(source), ReadSettings())


def test_a_template_cuts_nanoseconds_off(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Seen red: Python has no nanoseconds, so to_pylist asks for pandas."""
    when = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    nested = pa.array([{"t": [3_600_000_000_001]}], pa.struct([("t", pa.list_(pa.time64("ns")))]))
    source = write(tmp_path / "in.parquet", [1], when=when, nested=nested)
    (tmp_path / "t.j2").write_text("{{ when }} {{ nested.t[0] }}")
    settings = echo_settings(tokenizer_folder, template=tmp_path / "t.j2", max_new_tokens=99)
    run_job(str(source), tmp_path / "out", settings)
    text = answers(tmp_path / "out")["generated_text"][0][::-1]
    assert text == "20231114 22:13:20.123456 01:00:00"  # the tokenizer knows no hyphen
    assert written(tmp_path / "out")["when"].cast(pa.int64()).to_pylist() == [when[0].value]


def test_one_group_of_a_million_rows_is_read_in_batches(tmp_path: Path) -> None:
    rows = 1_000_000
    prompts = pa.array(np.char.add("p", np.arange(rows).astype(str)))
    opened = open_source(
        Location(write(tmp_path / "in.parquet", [rows], prompt=prompts)), ReadSettings()
    )
    sizes = [table.num_rows for table in opened._files[0].iter_batches(["prompt"], rows)]
    assert sum(sizes) == rows and max(sizes) == 2048
    taken = opened.take(np.array([rows - 1, 0]))
    assert taken["prompt"].to_pylist() == [f"p{rows - 1}", "p0"]
