"""Input files of every shape, good and bad."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import PromptBatch

CHAT = [{"role": "user", "content": "hi"}]


def write(path: Path, row_group_size: int = 1000, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_page_checksum=True)
    return path


def source(path: Path | str, **settings: Any) -> PromptSource:
    return open_source(Location(path), ReadSettings(**settings))


def rows(opened: PromptSource) -> PromptBatch:
    """All batches as one."""
    batches = list(opened.iter_prompts())
    starts = [batch.row_start for batch in batches]
    assert starts == [sum(len(b.ids) for b in batches[:n]) for n in range(len(batches))]
    return PromptBatch(
        0,
        [i for b in batches for i in b.ids],
        [c for b in batches for c in b.contents],
        [o for b in batches for o in b.overrides],
        [t for b in batches for t in b.tenants],
        tuple(r for b in batches for r in b.rejected),
    )


def refused(path: Path | str, **settings: Any) -> str:
    """The one sentence with which an input is refused."""
    with pytest.raises(InputError) as caught:
        list(source(path, **settings).iter_prompts())
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    assert Path(path).name.split("*")[0] in message or "--" in message
    return message


def test_prompts_come_with_ids_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        id=["x", "y"],
        prompt=["one", " "],
        max_new_tokens=[7, None],
        tenant=["t", None],
        sampling_params=[{"temperature": 0.5, "max_new_tokens": 1}, None],
    )
    batch = rows(source(path))
    assert batch.ids == ["x", "y"] and batch.contents == ["one", " "]
    assert batch.overrides == [{"temperature": 0.5, "max_new_tokens": 7}, {}]
    assert batch.tenants == ["t", None] and batch.rejected == ()


@pytest.mark.parametrize("encode", [json.dumps, lambda turns: turns])
def test_messages_are_structs_or_json(tmp_path: Path, encode: Any) -> None:
    path = write(tmp_path / "a.parquet", messages=[encode(CHAT), encode(CHAT * 2)])
    assert rows(source(path)).contents == [CHAT, CHAT * 2]


def test_the_prompt_wins_unless_messages_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", prompt=["p"], messages=[CHAT])
    assert rows(source(path)).contents == ["p"]
    assert rows(source(path, messages_column="messages")).contents == [CHAT]


@pytest.mark.fault(
    "dictionary, large_string, view",
    injected="prompts and ids as string, large_string, view and dictionary",
    outcome="read as the same text",
)
@pytest.mark.parametrize(
    "text_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_kind_of_string_column_reads_the_same(tmp_path: Path, text_type: Any) -> None:
    texts = pa.array(["a", "é\0", "a", "🌲"]).cast(text_type)
    opened = source(write(tmp_path / "a.parquet", prompt=texts, id=texts))
    assert rows(opened).contents == ["a", "é\0", "a", "🌲"] == rows(opened).ids
    assert opened.take(np.array([3, 0])).column("prompt").to_pylist() == ["🌲", "a"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, -2], ["1", "-2"]),
        ([1.5, 2.0], ["1.5", "2"]),
        ([True, False], ["true", "false"]),
        ([b"ab", b"c"], ["ab", "c"]),
        ([datetime.date(2026, 1, 2)] * 2, ["2026-01-02"] * 2),
        ([decimal.Decimal("1.50")] * 2, ["1.50"] * 2),
    ],
)
def test_ids_of_every_scalar_type_become_text(
    tmp_path: Path, values: list[Any], expected: list[str]
) -> None:
    path = write(tmp_path / "a.parquet", prompt=["p", "q"], custom_id=values)
    opened = source(path)
    assert opened.columns.id == "custom_id"
    assert rows(opened).ids == expected


def test_ids_are_made_from_file_group_and_row(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", row_group_size=2, prompt=["1", "2", "3"])
    write(tmp_path / "a.parquet", prompt=["0"])
    batch = rows(source(tmp_path))
    assert batch.ids == ["a.parquet:0:0", "b.parquet:0:0", "b.parquet:0:1", "b.parquet:1:0"]
    assert batch.contents == ["0", "1", "2", "3"]


def test_made_ids_differ_where_base_names_do_not(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.parquet", prompt=["0"])
    write(tmp_path / "y" / "a.parquet", prompt=["1"])
    assert rows(source(tmp_path)).ids == ["x/a.parquet:0:0", "y/a.parquet:0:0"]


def test_folder_glob_and_file(tmp_path: Path) -> None:
    one = write(tmp_path / "sub" / "a[1].parquet", prompt=["0"])
    write(tmp_path / "b.parquet", prompt=["1"])
    write(tmp_path / ".c.parquet", prompt=["hidden"])
    assert source(one).num_rows == 1
    assert source(tmp_path).num_rows == 2
    assert source(f"{tmp_path}/*.parquet").num_rows == 1
    assert source(f"{tmp_path}/**/*.parquet").num_rows == 2


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 99])
def test_limit_takes_the_first_rows_over_files_and_groups(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "a.parquet", row_group_size=2, prompt=["0", "1", "2"])
    write(tmp_path / "b.parquet", row_group_size=1, prompt=["3", "4"])
    opened = source(tmp_path, limit=limit)
    assert opened.num_rows == min(limit, 5) == len(rows(opened).ids)
    assert rows(opened).contents == ["0", "1", "2", "3", "4"][:limit]
    with pytest.raises(IndexError, match="rows must lie"):
        opened.take(np.array([opened.num_rows]))


@pytest.mark.fault(
    "nested columns",
    injected="structs of lists beside the prompts, in any row groups",
    outcome="carried through as they were",
)
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_take_in_any_order_equals_a_plain_read(
    tmp_path: Path, row_group_size: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inputs.prompt_source._CACHE_BYTES", cache_bytes)
    n = 60
    table = {
        "prompt": [f"p{i}" for i in range(n)],
        "tag": pa.array([f"t{i % 3}" for i in range(n)]).dictionary_encode(),
        "score": [None if i % 5 == 0 else i / 7 for i in range(n)],
        "nested": [{"a": [i, i + 1]} for i in range(n)],
    }
    write(tmp_path / "a.parquet", row_group_size, **table)
    write(tmp_path / "b.parquet", row_group_size, **table)
    plain = pl.concat(
        [pl.read_parquet(tmp_path / f, use_pyarrow=False) for f in ("a.parquet", "b.parquet")]
    )
    opened = source(tmp_path)
    shuffle = random.Random(0)
    for size in (0, 1, 5, 2 * n):
        wanted = [shuffle.randrange(2 * n) for _ in range(size)]
        taken = pl.from_arrow(opened.take(np.array(wanted, np.int64)))
        assert isinstance(taken, pl.DataFrame)
        expected = plain[wanted].with_columns(pl.col("tag").cast(pl.String))
        assert taken.rows() == expected.rows() and taken.columns == expected.columns


def test_take_survives_eviction_between_groups(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "a.parquet", 1, prompt=[str(i) for i in range(9)]))
    cache = type(opened._cache)(max_bytes=2 * opened.take(np.array([0])).nbytes)
    object.__setattr__(opened, "_cache", cache)
    for wanted in ([8, 0, 4], [4, 8, 1], [0, 1, 2, 3, 8, 4]):
        assert opened.take(np.array(wanted)).column("prompt").to_pylist() == [*map(str, wanted)]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one = source(write(tmp_path / "a.parquet", prompt=["0", "1"]))
    same = source(write(tmp_path / "other" / "b.parquet", prompt=["0", "1"]))
    other = source(write(tmp_path / "c.parquet", prompt=["0", "2"]))
    limited = source(tmp_path / "a.parquet", limit=1)
    unlimited = source(tmp_path / "a.parquet", limit=2)
    assert one.fingerprint() == same.fingerprint() == unlimited.fingerprint()
    assert len({one.fingerprint(), other.fingerprint(), limited.fingerprint()}) == 3


BAD_CELLS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": pa.array([None], pa.string())}, "NullPrompt"),
    ({"prompt": [""]}, "EmptyPrompt"),
    ({"messages": pa.array([None], pa.string())}, "NullPrompt"),
    ({"messages": ["{"]}, "BadMessages"),
    ({"messages": ["[" * 100_000]}, "BadMessages"),
    ({"messages": ["null"]}, "BadMessages"),
    ({"messages": ["[]"]}, "BadMessages"),
    ({"messages": ['["hi"]']}, "BadMessages"),
    ({"messages": ['[{"role": "user"}]']}, "BadMessages"),
    ({"messages": ['[{"role": "user", "content": ["canary"]}]']}, "BadMessages"),
    ({"messages": ['[{"role": "user", "content": "\\ud800"}]']}, "BadMessages"),
    ({"messages": [[{"role": "user", "content": None}]]}, "BadMessages"),
    ({"prompt": ["p"], "sampling_params": ["{"]}, "BadSamplingParams"),
    ({"prompt": ["p"], "sampling_params": ["[1]"]}, "BadSamplingParams"),
    ({"prompt": ["p"], "sampling_params": ['{"canary": 1}']}, "BadSamplingParams"),
    ({"prompt": ["p"], "sampling_params": ['{"temperature": "canary"}']}, "BadSamplingParams"),
    ({"prompt": ["p"], "sampling_params": ['{"max_new_tokens": true}']}, "BadSamplingParams"),
    ({"prompt": ["p"], "sampling_params": ['{"stop": [""]}']}, "BadSamplingParams"),
]


@pytest.mark.fault(
    "null, empty, whitespace prompts",
    injected="null and empty prompts and conversations, bad JSON, wrong fields",
    outcome="an error row with its reason, unquoted; its neighbour runs",
)
@pytest.mark.fault(
    "lone surrogates",
    injected="half a surrogate pair in a conversation of JSON",
    outcome="an error row (BadMessages)",
)
@pytest.mark.parametrize(("columns", "error_type"), BAD_CELLS)
def test_a_bad_cell_rejects_its_row_alone(
    tmp_path: Path, columns: dict[str, Any], error_type: str
) -> None:
    is_struct = "messages" in columns and isinstance(columns["messages"][0], list)
    good = {
        "prompt": "fine",
        "messages": CHAT if is_struct else json.dumps(CHAT),
        "sampling_params": '{"stop": "x", "temperature": 1}',
    }
    both: dict[str, Any] = {
        name: [*pa.array(c).to_pylist(), good[name]] for name, c in columns.items()
    }
    batch = rows(source(write(tmp_path / "a.parquet", id=["bad", "good"], **both)))
    assert [(r.row_index, r.error_type) for r in batch.rejected] == [(0, error_type)]
    assert batch.contents[0] is None and batch.contents[1] is not None
    assert batch.ids == ["bad", "good"] and "canary" not in batch.rejected[0].message


def test_sampling_fields_keep_their_types(tmp_path: Path) -> None:
    said = {"temperature": 1, "stop": "END", "top_k": None, "ignore_eos": True}
    path = write(tmp_path / "a.parquet", prompt=["p"], sampling_params=[json.dumps(said)])
    assert rows(source(path)).overrides == [
        {"temperature": 1, "stop": ("END",), "ignore_eos": True}
    ]


@pytest.mark.fault(
    "wrong or missing columns",
    injected="no prompt column, a column twice, a name that is not there",
    outcome="InputError, exit code 2, the columns are listed",
)
@pytest.mark.fault(
    "wrong types",
    injected="numbers for prompts, text for limits, lists for ids",
    outcome="InputError, exit code 2, column and type are named",
)
def test_refusals_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, text=["p"], n=[1])
    assert "(it has 'text', 'n')" in refused(path)
    assert "no column 'nope'" in refused(path, prompt_column="nope")
    assert "no column 'nope'" in refused(path, prompt_column="text", id_column="nope")
    assert "has the type int64" in refused(path, prompt_column="n")
    assert "exclude each other" in refused(path, prompt_column="text", messages_column="n")
    write(path, prompt=[CHAT])
    assert "--messages-column" in refused(path)
    assert rows(source(path, messages_column="prompt")).contents == [CHAT]
    write(path, messages=[[{"role": "user", "text": "hi"}]])
    assert "'messages'" in refused(path)
    write(path, prompt=["p"], max_new_tokens=["1"])
    assert "'max_new_tokens'" in refused(path)
    write(path, prompt=["p"], tenant=[1])
    assert "'tenant'" in refused(path)
    write(path, prompt=["p"], id=[[1]])
    assert "'id'" in refused(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["p"])] * 2, names=["prompt"] * 2), path)
    assert "twice" in refused(path)


@pytest.mark.fault(
    "truncated file",
    injected="the last 30 bytes cut off",
    outcome="InputError, exit code 2 (truncated)",
)
@pytest.mark.fault(
    "bad magic",
    injected="an empty file; JSON",
    outcome="InputError, exit code 2 (not a Parquet file)",
)
@pytest.mark.fault(
    "zero rows", injected="a file with a schema and no row", outcome="InputError, exit code 2"
)
def test_refusals_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert "no file, folder or match" in refused(path)
    assert "no *.parquet, *.jsonl or *.csv file" in refused(tmp_path)
    path.write_bytes(b"")
    assert "neither a Parquet file nor" in refused(path)
    path.write_bytes(b'{"prompt": "p"}')
    assert "neither a Parquet file nor" in refused(path)
    write(path, prompt=[f"p{i}" for i in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "truncated" in refused(path)
    path.write_bytes(whole[:300] + whole[-300:])
    assert "damaged" in refused(path)
    write(path, prompt=pa.array([], pa.string()))
    assert "no rows" in refused(path)


def test_files_must_have_one_schema(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", prompt=["p"], x=[1])
    write(tmp_path / "b.parquet", prompt=pa.array(["p"], pa.large_string()), x=[2])
    assert source(tmp_path).num_rows == 2
    write(tmp_path / "c.parquet", prompt=["p"], x=["1"])
    assert "'x' is int64" in refused(tmp_path)
    write(tmp_path / "c.parquet", prompt=["p"])
    assert "absent" in refused(tmp_path)


def flip(path: Path, needle: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(needle)] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(
    "flipped byte",
    injected="one bit in a page with a checksum",
    outcome="InputError, exit code 2, before the device is used; carried columns too",
)
def test_damage_in_a_page_is_found_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": ["needle"] * 3, "carried": ["thread"] * 3})
    pq.write_table(table, path, compression="none", write_page_checksum=True)
    flip(path, b"thread")
    opened = source(path)
    assert len(rows(opened).ids) == 3
    with pytest.raises(InputError, match=r"a\.parquet is damaged"):
        opened.check_carried_columns()
    with pytest.raises(InputError, match=r"a\.parquet is damaged"):
        opened.take(np.array([0]))
    flip(path, b"needle")
    assert "damaged" in refused(path)


@pytest.mark.fault(
    "invalid UTF-8", injected="the bytes FF FE as a string", outcome="InputError, exit code 2"
)
def test_text_that_is_not_utf8_is_damage(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 2], np.int32).tobytes())
    bad = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    assert "UTF8" in refused(write(tmp_path / "a.parquet", prompt=bad))


def test_an_input_that_changes_under_the_run_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", prompt=["p"])
    opened = source(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="changed while"):
        opened.take(np.array([0]))


def test_fuzzed_files_end_in_one_error_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 5, prompt=[f"p{i}" for i in range(20)], x=list(range(20)))
    whole, chance, refusals = path.read_bytes(), random.Random(7), 0
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(4, len(broken) - 4)] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            opened = source(path)
            rows(opened)
            opened.take(np.arange(opened.num_rows))
        except InputError:
            refusals += 1
    assert refusals > 50
