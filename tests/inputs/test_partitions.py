"""Folders that are columns: which ones, of which type, and that they are content like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.partitions import read_partitions
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from tests.tiny_job import answers, echo_settings


def write(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def source(path: Path | str, **settings: Any) -> PromptSource:
    return open_source(Location(path), ReadSettings(**settings))


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        source(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("top", {"a": 1, "b": "x y"}),
        ("top/a=1", {"b": "x y"}),
        ("top/a=1/b=x%20y", {}),
        ("top/a=1/b=x%20y/in.parquet", {}),
        ("top/*/*/*.parquet", {"a": 1, "b": "x y"}),
        ("top/a=*/b=x%20y/in.parquet", {"a": 1, "b": "x y"}),
        ("top/a=1/**/in.parquet", {"b": "x y"}),
        ("t*/a=1/b=*/*", {"a": 1, "b": "x y"}),
        (".", {"a": 1, "b": "x y"}),
        ("other", {}),
    ],
)
def test_only_folders_below_the_argument_count(argument: str, expected: dict[str, Any]) -> None:
    """Seen red: of a glob every folder of the path, of a folder itself among them."""
    table = read_partitions(argument, ["top/a=1/b=x%20y/in.parquet"])
    assert table.to_pylist() == ([expected] if expected else [])


def test_a_folder_may_look_like_a_glob() -> None:
    table = read_partitions("top/k=[1]", ["top/k=[1]/a=2/in.parquet"])
    assert table.to_pylist() == [{"a": 2}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "-20", "0"], [1, -20, 0]),
        (["1", "02"], ["1", "02"]),
        (["1", "x"], ["1", "x"]),
        (["1", "+2"], ["1", "+2"]),
        (["1", "1_0"], ["1", "1_0"]),
        (["1", "٣"], ["1", "٣"]),
        (["1", ""], ["1", ""]),
        (["-0"], ["-0"]),
        ([str(2**63 - 1)], [2**63 - 1]),
        ([str(2**63)], [str(2**63)]),
        (["5", "__HIVE_DEFAULT_PARTITION__"], [5, None]),
        (["__HIVE_DEFAULT_PARTITION__"], [None]),
        (["a%2Fb", "c=d", "%C3%A9"], ["a/b", "c=d", "é"]),
        (["__HIVE_DEFAULT_PARTITION__%20"], ["__HIVE_DEFAULT_PARTITION__ "]),
    ],
)
def test_values_and_their_type(values: list[str], expected: list[Any]) -> None:
    column = read_partitions("top", [f"top/k={v}/{n}.parquet" for n, v in enumerate(values)])["k"]
    assert column.to_pylist() == expected
    is_number = any(isinstance(value, int) for value in expected)
    assert column.type == (pa.int64() if is_number else pa.large_string())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["d/a=1/x", "d/b=1/x"], "'a', but d/b=1/x of 'b'"),
        (["d/a=1/x", "d/x"], "but d/x of no key"),
        (["d/a=1/a=2/x"], "two folders of 'a'"),
        (["d/a=%FF/x"], "not text in UTF-8"),
        (["d/a=\udcff/x"], "not text in UTF-8"),
    ],
)
def test_folders_that_do_not_fit_are_named(names: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_partitions("d", names)


def test_what_is_no_key_and_value_is_a_plain_folder(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "=x" / "k=1" / "more" / "a.parquet", prompt=["p"])
    assert source(tmp_path).schema.names == ["prompt", "k"]


def test_constants_stand_beside_each_files_rows(tmp_path: Path) -> None:
    """Seen red: rows of a batch over two groups, a limit within a file, no column but constants."""
    write(tmp_path / "lang=de" / "n=1" / "x.parquet", prompt=["0", "1", "2"], own=[0, 1, 2])
    write(tmp_path / "n=2" / "lang=en" / "x.parquet", own=[3], prompt=["3"])
    opened = source(tmp_path, limit=4)
    assert opened.schema == pa.schema(
        [("prompt", pa.large_string()), ("own", pa.int64())]
        + [("lang", pa.large_string()), ("n", pa.int64())]
    )
    opened.check_carried_columns()
    taken = opened.take(np.array([3, 0, 2]))
    assert taken.schema == opened.schema
    assert taken.to_pylist() == [
        {"prompt": "3", "own": 3, "lang": "en", "n": 2},
        {"prompt": "0", "own": 0, "lang": "de", "n": 1},
        {"prompt": "2", "own": 2, "lang": "de", "n": 1},
    ]


def test_a_column_of_the_file_wins(tmp_path: Path) -> None:
    write(tmp_path / "lang=de" / "x.parquet", prompt=["p"], lang=["fr"])
    opened = source(tmp_path)
    assert opened.take(np.array([0])).to_pylist() == [{"prompt": "p", "lang": "fr"}]
    assert opened.fingerprint() == source(tmp_path / "lang=de").fingerprint()
    write(tmp_path / "lang=en" / "x.parquet", prompt=["q"])
    both = source(tmp_path).take(np.array([0, 1]))
    assert both["lang"].to_pylist() == ["fr", "en"]
    write(tmp_path / "lang=de" / "x.parquet", prompt=["p"], lang=[1])
    assert "'lang' is int64 in" in refused(tmp_path)


def test_a_renamed_folder_is_another_input(tmp_path: Path) -> None:
    """Seen red: the fingerprint of the files' bytes alone."""
    path = write(tmp_path / "d" / "lang=de" / "x.parquet", prompt=["p"])
    before = source(tmp_path).fingerprint()
    path.parent.rename(tmp_path / "d" / "lang=en")
    after = source(tmp_path).fingerprint()
    (tmp_path / "d").rename(tmp_path / "e")
    assert before != after == source(tmp_path).fingerprint()
    assert after != source(tmp_path / "e" / "lang=en").fingerprint()


def test_a_template_uses_them_and_the_output_carries_them(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    write(tmp_path / "in" / "day=01" / "lang=de" / "x.parquet", word=["ab", "cd"])
    write(tmp_path / "in" / "day=02" / "lang=__HIVE_DEFAULT_PARTITION__" / "x.parquet", word=["e"])
    (tmp_path / "t.j2").write_text("{{ lang or 'any' }} {{ day }}")
    settings = echo_settings(tokenizer_folder, template=tmp_path / "t.j2", max_new_tokens=9)
    run_job(str(tmp_path / "in"), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["generated_text"].to_list() == ["10 ed", "10 ed", "20 yna"]
    assert rows["id"].to_list()[0] == "day=01/lang=de/x.parquet:0:0"
    carried = {"word": ["ab", "cd", "e"], "day": ["01", "01", "02"], "lang": ["de", "de", None]}
    assert rows[list(carried)].equals(pl.DataFrame(carried))


def test_json_lines_have_them_too(tmp_path: Path) -> None:
    for lang in ("de", "en"):
        folder = tmp_path / "in" / f"lang={lang}"
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text('{"prompt": "p"}\n')
    opened = open_source(
        Location(tmp_path / "in"), ReadSettings(), copies=ParquetCopies(tmp_path / "cache")
    )
    assert opened.take(np.array([1])).to_pylist() == [{"prompt": "p", "lang": "en"}]
    hashes = {opened.fingerprint(), source_of_renamed(tmp_path).fingerprint()}
    assert len(hashes) == 2


def source_of_renamed(tmp_path: Path) -> PromptSource:
    (tmp_path / "in" / "lang=en").rename(tmp_path / "in" / "lang=es")
    return open_source(
        Location(tmp_path / "in"), ReadSettings(), copies=ParquetCopies(tmp_path / "cache")
    )
