"""JSON files that are one list: items as rows, in bounded memory, and each way to be broken."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.inputs import array_reader
from pipeline.inputs.conversion import convert
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.line_reader import read_lines
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.inputs.selection import OTHER_JSON, select
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings


def opened(path: Path, tmp_path: Path) -> PromptSource:
    copies = ParquetCopies(tmp_path / "cache" / "inputs")
    return open_source(Location(path), ReadSettings(), copies=copies)


def rows(source: PromptSource) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = source.take(np.arange(source.num_rows)).to_pylist()
    return found


def write(path: Path, content: object) -> Path:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


ROWS = [
    {"id": "a", "prompt": "x [1, {"},
    {"id": "b", "prompt": '"],\\'},
    {"id": "c", "prompt": "é"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.json", json.dumps(ROWS)),
        ("in.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("in.json", "\ufeff\n [\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n\n"),
        ("in.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("in.json", "".join(json.dumps(row) + "\n" for row in ROWS)),  # lines by another name
    ],
)
def test_items_are_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    source = opened(write(tmp_path / name, content), tmp_path)
    assert rows(source) == ROWS


def test_requests_of_a_batch_may_be_a_list(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    requests = [{"custom_id": name, "url": "/v1/chat/completions", "body": body} for name in "ab"]
    (batch,) = opened(write(tmp_path / "in.json", requests), tmp_path).iter_prompts()
    assert batch.ids == ["a", "b"] and batch.contents == [body["messages"]] * 2


@pytest.mark.parametrize("window", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=1)])
def test_wherever_the_window_ends_items_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, text: str
) -> None:
    monkeypatch.setattr(array_reader, "_READ_AT_A_TIME", window)
    file = InputFile.local(write(tmp_path / "in.json", text))
    assert [item for _, item in read_lines(file)] == ROWS


scalars = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"))
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars | floats,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), min_size=1))
def test_any_list_of_objects_is_read(
    tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("json") / "in.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_reader, "_READ_AT_A_TIME", 5)
        assert [item for _, item in read_lines(InputFile.local(path))] == items


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "holds no line"),
        ("[", "ends before its list does"),
        ('[{"prompt": "a"}', "ends before its list does, after item 1"),
        ('[{"prompt": "a"},', "ends before its list does, after item 1"),
        ('[{"prompt": "a"},]', "item 2 of .* is not a JSON object"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "is broken after item 1: there is no ','"),
        ('[{"prompt": "a"}, 3]', "item 2 of .* is not a JSON object"),
        ('[["a"]]', "item 1 of .* is not a JSON object"),
        ('[{"prompt": "a"}, {"prompt" "b"}]', "item 2 of .* is not a JSON object"),
        ('[{"prompt": "a"}, {"prompt": "b', "item 2 of .* is not a JSON object"),
        ('[{"prompt": NaN}]', "item 1 of .* holds NaN"),
        ('[{"prompt": "a"}] {"prompt": "b"}', "goes on behind its list"),
        ('[{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}]", "item 1 .* too deep"),
        (b'[{"prompt": "\xff"}]', "item 1 of .* is not a JSON object in UTF-8"),
        ('{"data": [{"prompt": "a"}]}', "neither a column 'prompt' nor 'messages'"),
    ],
)
def test_what_is_broken_is_one_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        opened(write(tmp_path / "in.json", content), tmp_path)
    assert "\n" not in str(error.value)


def test_an_item_that_is_too_long_or_holds_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_reader, "_READ_AT_A_TIME", 100)
    path = write(tmp_path / "in.json", [{"prompt": "a" * 5000}])
    monkeypatch.setattr(array_reader, "LONGEST", 1000)
    with pytest.raises(InputError, match="item 1 of .* is longer than 1,000 characters; split it"):
        opened(path, tmp_path)
    monkeypatch.setattr(array_reader, "MOST_VALUES", 100)
    path = write(tmp_path / "in.json", [{"prompt": "a", "x": [0] * 300}])
    with pytest.raises(InputError, match="item 1 of .* holds over 100 values"):
        opened(path, tmp_path)


def test_a_long_list_takes_the_memory_of_a_window(tmp_path: Path) -> None:
    """10 MB in a single line; json.load takes more than 30."""
    item = json.dumps({"prompt": "x" * 1000})
    path = write(tmp_path / "in.json", "[" + ",".join([item] * 10_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_lines(InputFile.local(path))) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_list_with_a_bad_item_keeps_its_other_rows(tmp_path: Path) -> None:
    items = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2**70}]
    source = opened(write(tmp_path / "in.json", items), tmp_path)
    (batch,) = source.iter_prompts()
    (bad,) = batch.rejected
    assert bad.row_index == 1 and "item 2 of" in bad.message


def test_json_beside_other_files_is_counted_and_not_read(tmp_path: Path) -> None:
    found = select(["a.parquet", "dataset_info.json", "b.csv"])
    assert found.names == ("a.parquet", "b.csv") and found.left_out == {OTHER_JSON: 1}


def test_convert_takes_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "in.json", ROWS)
    assert convert(Location(path), Location(tmp_path / "out.parquet")) == 3
