"""Frames of every kind: they come back whole and in order, or are refused in one sentence."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import kvcoppice
from pipeline.errors import CoppiceError, UsageError
from tests.job.test_clock import EVENING, MORNING, OnDay, at

__all__ = ["at"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


def ask(rows: Any, model: Path, output: Any = None, **settings: Any) -> Any:
    return kvcoppice.frame(rows, output, model=model, engine="echo", **settings)


PROMPTS = ["ab", "cd", "ef"]
COLUMNS: dict[str, Any] = {
    "categorical": pl.Series(["x", "y", "x"], dtype=pl.Categorical),
    "enum": pl.Series(["x", "y", "x"], dtype=pl.Enum(["x", "y"])),
    "decimal": pl.Series([Decimal("1.50"), None, Decimal("2.25")], dtype=pl.Decimal(10, 2)),
    "duration": pl.Series([datetime.timedelta(1), None, datetime.timedelta(0, 1)]),
    "time": pl.Series([datetime.time(1), None, datetime.time(2)]),
    "date": pl.Series([datetime.date(2026, 1, 1)] * 3),
    "zoned": pl.Series([datetime.datetime(2026, 7, 1)] * 3).dt.replace_time_zone("Europe/Paris"),
    "null": pl.Series([None] * 3),
    "struct": pl.Series([{"a": 1, "b": ["x"]}] * 3),
    "array": pl.Series([[1, 2]] * 3, dtype=pl.Array(pl.Int64, 2)),
    "binary": pl.Series([b"\x00\xff", None, b""]),
    "uint64": pl.Series([2**64 - 1, 0, None], dtype=pl.UInt64),
    "int128": pl.Series([2**100, 0, None], dtype=pl.Int128),
    "nan": pl.Series([float("nan"), float("inf"), None]),
    "empty lists": pl.Series([[], None, ["x"]], dtype=pl.List(pl.String)),
    "bool": pl.Series([True, None, False]),
    "float32": pl.Series([0.1, None, 1.0], dtype=pl.Float32),
    "object": pl.Series([object(), object(), object()], dtype=pl.Object),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_type_comes_back_or_is_refused(name: str, tokenizer_folder: Path) -> None:
    frame = pl.DataFrame({"prompt": PROMPTS, name: COLUMNS[name]})
    try:
        answered = ask(frame, tokenizer_folder)
    except CoppiceError as error:
        assert isinstance(error, UsageError) and name in str(error), error
        assert name in ("object", "int128")
        return
    assert answered["generated_text"].to_list() == ["ba", "dc", "fe"]
    back = answered[name]
    if name not in ("categorical", "enum", "array", "zoned", "duration"):
        assert back.equals(frame[name], null_equal=True) or name == "nan", back
    if name == "zoned":
        assert back.dt.convert_time_zone("UTC").equals(frame[name].dt.convert_time_zone("UTC"))
    if name in ("categorical", "enum"):
        assert back.cast(pl.String).to_list() == ["x", "y", "x"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.month_day_nano_interval(),
        pa.list_view(pa.int64()),
        pa.string_view(),
        pa.binary_view(),
        pa.dense_union([pa.field("a", pa.int64())]),
        pa.run_end_encoded(pa.int32(), pa.int64()),
        pa.float16(),
        pa.map_(pa.string(), pa.int64()),
        pa.dictionary(pa.int8(), pa.string()),
        pa.uuid(),
        pa.null(),
    ],
    ids=str,
)
def test_an_arrow_column_of_any_type_comes_back_or_is_refused(
    kind: pa.DataType, tokenizer_folder: Path
) -> None:
    try:
        column = pa.nulls(3, kind)
    except pa.ArrowException:
        pytest.skip("pyarrow makes no nulls of it")
    table = pa.table({"prompt": PROMPTS, "odd one": column})
    try:
        answered = ask(table, tokenizer_folder)
    except CoppiceError as error:
        assert isinstance(error, UsageError) and "odd one" in str(error), error
        return
    assert answered.column("generated_text").to_pylist() == ["ba", "dc", "fe"]
    assert answered.column("odd one").null_count == 3 or kind == pa.null()


NAMES = [
    ["x", "input_x"],
    ["status", "x", "input_x"],
    ["input_status"],
    ["input_prompt"],
    ["kvcoppice_rows", "row_index"],
    ["a b", 'q"uote', "it's", ""],
    ["samples", "logprobs2"],
    ["generated_text"],
    ["Prompt"],
]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_columns_of_any_name_come_first_and_keep_their_values(
    names: list[str], tokenizer_folder: Path
) -> None:
    """Two columns `x` and `input_x` were taken for one."""
    duckdb = pytest.importorskip("duckdb")
    frame = pl.DataFrame({"prompt": PROMPTS} | {n: [f"{n}{i}" for i in "123"] for n in names})
    answered = ask(frame, tokenizer_folder)
    assert len(set(answered.columns)) == answered.width
    for place, name in enumerate(frame.columns):
        back = answered.columns[place]
        assert back in (name, f"input_{name}")
        assert answered[back].to_list() == frame[name].to_list()
    if {"", "Prompt"} & {*names}:
        return  # which DuckDB calls otherwise itself
    with duckdb.connect() as connection:
        connection.register("frame", frame)
        rows = connection.sql("SELECT * FROM frame")
        found = kvcoppice.relation(rows, model=tokenizer_folder, engine="echo")
        assert found.columns == answered.columns
        assert found.pl()["generated_text"].to_list() == ["ba", "dc", "fe"]


@pytest.mark.parametrize("way", ["DataFrame", "LazyFrame", "Table", "no columns", "chunks"])
def test_a_frame_without_a_row_is_one_sentence(way: str, tokenizer_folder: Path) -> None:
    frame = pl.DataFrame({"prompt": []}, schema={"prompt": pl.String})
    rows: Any = {
        "DataFrame": frame, "LazyFrame": frame.lazy(), "Table": frame.to_arrow(),
        "no columns": pl.DataFrame(), "chunks": pa.chunked_array([], pa.string()),
    }[way]  # fmt: skip
    with pytest.raises(UsageError) as error:
        ask(rows, tokenizer_folder)
    assert "\n" not in str(error.value)


def test_samples_and_failures_of_a_frame(tokenizer_folder: Path) -> None:
    frame = pl.DataFrame({"prompt": ["ab", None, "ef"]})
    with pytest.raises(kvcoppice.TooManyFailedRows):
        ask(frame, tokenizer_folder)
    with pytest.raises(kvcoppice.TooManyFailedRows):
        ask(frame, tokenizer_folder)
    answered = ask(frame, tokenizer_folder, fail_on_error="100%")
    assert answered["generated_text"].to_list() == ["ba", None, "fe"]
    many = ask(frame.drop_nulls(), tokenizer_folder, n=3, temperature=1.0, explode=True)
    assert many["sample_index"].to_list() == [0, 1, 2] * 2


def test_a_lazy_frame_that_fails_says_why(tokenizer_folder: Path) -> None:
    frame = pl.LazyFrame({"prompt": PROMPTS}).select(pl.col("nothing"))
    with pytest.raises((pl.exceptions.ColumnNotFoundError, UsageError), match="nothing"):
        ask(frame, tokenizer_folder)


def test_numbers_of_numpy_are_numbers(tokenizer_folder: Path) -> None:
    """What a notebook counts is often one."""
    frame = pl.DataFrame({"prompt": PROMPTS})
    answered = ask(frame, tokenizer_folder, max_new_tokens=np.int64(1))
    assert answered["generated_text"].to_list() == ["b", "d", "f"]


def test_a_frame_is_the_same_on_the_next_day(
    at: OnDay, tokenizer_folder: Path, tmp_path: Path, own_cache: Path
) -> None:
    """Seen red: with a template that prints the date, each day computed all of it anew."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%Y.%m.%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    frame = pl.DataFrame({"prompt": PROMPTS})
    dated = {"chat_template": template, "apply_chat_template": True, "max_new_tokens": 30}
    at(EVENING)
    first = ask(frame, tokenizer_folder, **dated)
    assert first["generated_text"][0] == "ba 22.11.6202"
    at(MORNING)
    assert ask(frame, tokenizer_folder, **dated).equals(first)
    assert len(list(own_cache.glob("frames/*/runs/*"))) == 1
    named = ask(frame, tokenizer_folder, clock=MORNING, **dated)
    assert named["generated_text"][0] == "ba 32.11.6202"
    assert len(list(own_cache.glob("frames/*/runs/*"))) == 2
