"""Files as other tools write them: they run, come out as they went in, and no field is ignored."""

from __future__ import annotations

import datetime
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.generation import resolve_sampling
from pipeline.inputs.conversion import convert
from pipeline.inputs.prompt_source import open_source
from pipeline.job.job import Job, open_job
from pipeline.job.planning import plan_rows
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import PromptBatch
from pipeline.records import SamplingParams
from pipeline.run import run_job
from pipeline.settings import JobSettings, WriteSettings
from tests.tiny_job import answers, echo_settings

WRITE = WriteSettings(rows_per_part=1000)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def chat(tmp_path: Path, tokenizer_folder: Path) -> JobSettings:
    (tmp_path / "chat.jinja").write_text(CHAT)
    return echo_settings(
        tokenizer_folder, chat_template=tmp_path / "chat.jinja", max_new_tokens=200
    )


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def written(output: Path) -> pa.Table:
    parts = sorted((output / "data").iterdir())
    return pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("row_index")


def first_batch(job: Job) -> PromptBatch:
    return next(job.source.iter_prompts())


def params(job: Job) -> list[SamplingParams]:
    return job.preparation().prepare(first_batch(job)).params


OFFSETS = ["+05:30", "-03:30", "+00:00", "Z", "UTC", "Europe/Berlin"]


@pytest.mark.fault(
    "types that polars cannot read back",
    injected="carried times with fixed offsets, also in lists; UUIDs; text typed as JSON; a time "
    "zone that does not exist",
    outcome="carried (times as the same instants in UTC), or refused before the device is used",
)
@pytest.mark.parametrize("zone", OFFSETS)
def test_times_with_an_offset_are_carried(tmp_path: Path, settings: JobSettings, zone: str) -> None:
    """Seen red: a panic of polars when all rows were answered, and again at each resume."""
    times = pa.array([1_700_000_000_000_000, None]).cast(pa.timestamp("us", zone))
    lists = pa.array([[1], None]).cast(pa.list_(pa.timestamp("ms", zone)))
    source = write(tmp_path / "in.parquet", prompt=["a", "b"], at=times, all=lists)
    run_job(str(source), tmp_path / "out", settings)
    assert run_job(str(source), tmp_path / "out", settings).was_complete
    found = written(tmp_path / "out")
    assert found["at"].cast(pa.int64()).to_pylist() == [1_700_000_000_000_000, None]
    assert answers(tmp_path / "out")["at"].dt.epoch("us").to_list()[0] == 1_700_000_000_000_000
    assert found.schema.field("at").type.tz == ("Europe/Berlin" if "/" in zone else "UTC") or (
        zone == "+00:00"
    )


def test_a_template_prints_a_time_in_its_own_offset(tmp_path: Path, tokenizer_folder: Path) -> None:
    times = pa.array([0]).cast(pa.timestamp("us", "+05:30"))
    source = write(tmp_path / "in.parquet", at=times)
    (tmp_path / "t.j2").write_text("{{ at }}")
    settings = echo_settings(tokenizer_folder, template=tmp_path / "t.j2")
    assert first_batch(open_job(str(source), settings)).contents == ["1970-01-01 05:30:00+05:30"]


def test_a_zone_that_does_not_exist_is_refused_before_the_first_row(
    tmp_path: Path, settings: JobSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence: a panic of polars would print itself besides."""
    times = pa.array([0]).cast(pa.timestamp("us", "Nowhere/City"))
    source = write(tmp_path / "in.parquet", prompt=["p"], at=times)
    with pytest.raises(InputError, match="'at' of .*in.parquet has the type .*cannot carry"):
        open_job(str(source), settings)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("with_arrow", [True, False])
def test_uuids_are_ids(tmp_path: Path, settings: JobSettings, with_arrow: bool) -> None:
    """As DuckDB writes them. Seen red: "does not turn into text"."""
    names = [uuid.UUID(int=5), uuid.UUID(int=2**127)]
    ids = pa.array([name.bytes for name in names], pa.binary(16)).cast(pa.uuid())
    table = pa.table({"id": ids, "prompt": ["a", "b"], "other": ids})
    pq.write_table(table, tmp_path / "in.parquet", store_schema=with_arrow)
    run_job(str(tmp_path / "in.parquet"), tmp_path / "out", settings)
    assert answers(tmp_path / "out")["id"].to_list() == [str(name) for name in names]
    found = written(tmp_path / "out")
    assert found["input_id"].to_pylist() == names == found["other"].to_pylist()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int64(), [7, 2**60]),
        (pa.uint8(), [7, 9]),
        (pa.date32(), [datetime.date(2026, 1, 2)] * 1),
    ],
)
def test_ids_join_with_the_input(
    tmp_path: Path, settings: JobSettings, kind: pa.DataType, values: list[Any]
) -> None:
    """Seen red: numbers came back as text alone."""
    source = write(tmp_path / "in.parquet", id=pa.array(values, kind), prompt=["p"] * len(values))
    run_job(str(source), tmp_path / "out", settings)
    joined = answers(tmp_path / "out").join(
        pl.read_parquet(source), left_on="input_id", right_on="id"
    )
    assert len(joined) == len(values)
    assert joined["id"].to_list() == [str(value) for value in values]


@pytest.mark.parametrize("with_arrow", [True, False])
def test_conversations_typed_as_json(tmp_path: Path, chat: JobSettings, with_arrow: bool) -> None:
    turns = json.dumps([{"role": "user", "content": "hi"}])
    columns = pa.table(
        {
            "messages": pa.array([turns, None]).cast(pa.json_()),
            "sampling_params": pa.array(['{"seed": 1}', None]).cast(pa.json_()),
            "more": pa.array(["[1]", None]).cast(pa.json_()),
        }
    )
    pq.write_table(columns, tmp_path / "in.parquet", store_schema=with_arrow)
    job = open_job(str(tmp_path / "in.parquet"), chat)
    batch = first_batch(job)
    assert batch.contents == [[{"role": "user", "content": "hi"}], None]
    assert batch.overrides[0] == {"seed": 1}
    with pytest.raises(Exception, match="1 of 2 rows failed"):
        run_job(str(tmp_path / "in.parquet"), tmp_path / "out", chat)
    assert written(tmp_path / "out")["more"].to_pylist() == ["[1]", None]


WILD_TURN = {
    "content": "why?", "role": "user", "country": "DE", "toxic": False, "redacted": True,
    "hashed_ip": None, "header": {"accept-language": "de"}, "turn_identifier": 102002,
    "timestamp": datetime.datetime(2026, 1, 2), "usage": {"total_tokens": 5},
}  # fmt: skip


def test_turns_with_further_fields_run(tmp_path: Path, chat: JobSettings) -> None:
    """As WildChat has them. Seen red: every row failed, and no field was named."""
    source = write(tmp_path / "in.parquet", messages=[[WILD_TURN], [WILD_TURN] * 2])
    job = open_job(str(source), chat)
    batch = first_batch(job)
    assert not batch.rejected
    assert batch.contents[0] == [{"role": "user", "content": "why?", "country": "DE"}]
    (note,) = job.source.columns.describe()
    assert note.endswith("toxic, redacted, header, turn_identifier, timestamp, usage")
    run_job(str(source), tmp_path / "out", chat)
    assert written(tmp_path / "out")["messages"].to_pylist()[0] == [WILD_TURN]


@pytest.mark.parametrize("as_json", [True, False])
def test_content_may_be_parts_of_text(tmp_path: Path, chat: JobSettings, as_json: bool) -> None:
    """Joined as vLLM does for templates that take text."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = [{"role": "user", "content": parts}]
    source = write(tmp_path / "in.parquet", messages=[json.dumps(turns) if as_json else turns])
    batch = first_batch(open_job(str(source), chat))
    assert batch.contents == [[{"role": "user", "content": "one\ntwo"}]]


def test_a_field_of_objects_that_is_always_null_is_read_in_slices(
    tmp_path: Path, settings: JobSettings
) -> None:
    """Seen red: Arrow's cast made it shorter than its rows, an unexpected ArrowInvalid."""
    rows = [[{"a": None, "b": n}] * (n % 3) for n in range(5000)]
    source = write(tmp_path / "in.parquet", prompt=[f"p{n}" for n in range(5000)], x=rows)
    run_job(str(source), tmp_path / "out", settings.model_copy(update={"write": WRITE}))
    assert written(tmp_path / "out")["x"].to_pylist() == rows


def test_objects_without_fields_are_json_text(tmp_path: Path, settings: JobSettings) -> None:
    """Seen red: `"metadata": {}` in all lines did "not fit into a column"."""
    line = {"prompt": "p", "metadata": {}, "sampling_params": {}, "more": [{"empty": {}}]}
    source = write_lines(tmp_path / "in.jsonl", line, line | {"more": None}, {"prompt": "q"})
    run_job(str(source), tmp_path / "out", settings)
    found = written(tmp_path / "out")
    assert found["metadata"].to_pylist() == ["{}", "{}", None]
    assert found["more"].to_pylist() == ['[{"empty": {}}]', None, None]


def test_a_conversation_may_have_text_here_and_parts_there(
    tmp_path: Path, chat: JobSettings
) -> None:
    """Seen red: "the field 'messages' of line 1 ... cannot be a value of a column"."""
    parts = [{"type": "text", "text": "one"}]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    line = {"messages": turns}
    source = write_lines(tmp_path / "in.jsonl", line, {"messages": turns[:1]}, line)
    expected = [turns[0], {"role": "user", "content": "one"}]
    batch = first_batch(open_job(str(source), chat))
    assert batch.contents == [expected, expected[:1], expected]


def test_nested_values_of_two_types_are_json_text(tmp_path: Path, settings: JobSettings) -> None:
    """Seen red: one line with `"stop": "x"` beside lists stopped the job."""
    source = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "p", "stop": ["x", "y"], "meta": {"a": 1}, "tags": ["a"]},
        {"prompt": "p", "stop": "x", "meta": "none", "tags": [1, "a"]},
        {"prompt": "p", "tags": None},
    )
    job = open_job(str(source), settings)
    assert [row.get("stop") for row in first_batch(job).overrides] == [("x", "y"), ("x",), None]
    run_job(str(source), tmp_path / "out", settings)
    found = written(tmp_path / "out")
    assert found["meta"].to_pylist() == ['{"a": 1}', '"none"', None]
    assert found["tags"].to_pylist() == ['["a"]', '[1, "a"]', None]


def test_a_prompt_that_is_an_object_is_not_taken_for_text(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": {}}, {"prompt": {}})
    with pytest.raises(InputError, match="'prompt' .*json"):
        open_job(str(source), settings)


def test_an_optional_field_may_be_null_or_absent_in_a_file_of_lines(
    tmp_path: Path, settings: JobSettings
) -> None:
    """Seen red: "column 'note' is null in a.jsonl but string in b.jsonl"."""
    folder = tmp_path / "in"
    write_lines(folder / "a.jsonl", {"prompt": "a", "note": None, "score": 1, "deep": {"x": None}})
    write_lines(folder / "b.jsonl", {"prompt": "b", "note": "n", "score": 0.5, "deep": {"x": "y"}})
    write_lines(folder / "c.jsonl", {"prompt": "c", "score": None, "tenant": None})
    run_job(str(folder), tmp_path / "out", settings)
    found = written(tmp_path / "out")
    assert found["note"].to_pylist() == [None, "n", None]
    assert found["score"].to_pylist() == [1.0, 0.5, None]
    assert found["deep"].to_pylist() == [{"x": None}, {"x": "y"}, None]


def test_parquet_files_may_differ_in_what_is_null_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.parquet", prompt=["a"], note=pa.nulls(1))
    write(folder / "b.parquet", prompt=["b"], note=["n"])
    opened = open_source(Location(folder), ReadSettings())
    assert str(opened.schema.field("note").type) == "large_string" and opened.num_rows == 2
    write(folder / "c.parquet", prompt=["c"])
    with pytest.raises(InputError, match="absent in .*c.parquet"):
        open_source(Location(folder), ReadSettings())


def request(name: str, **body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


NEUTRAL: dict[str, Any] = {
    "n": 1, "repetition_penalty": 1.0, "parallel_tool_calls": True, "metadata": {}, "tools": [],
    "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0.0, "min_p": 0, "best_of": 1,
    "response_format": {"type": "text"}, "tool_choice": "auto", "modalities": ["text"], "user": "u",
    "stream": False, "store": True, "stream_options": None, "min_tokens": 0, "logit_bias": {},
    "use_beam_search": False, "skip_special_tokens": True, "stop_token_ids": [],
    "length_penalty": 1,
    "include_stop_str_in_output": False, "guided_json": None, "chat_template_kwargs": {},
}  # fmt: skip


def test_neutral_fields_of_a_request_pass(tmp_path: Path, chat: JobSettings) -> None:
    source = write_lines(tmp_path / "in.jsonl", request("a", **NEUTRAL), request("b"))
    batch = first_batch(open_job(str(source), chat))
    assert not batch.rejected and batch.overrides[1] == {}
    said = batch.overrides[0]
    assert said.keys() <= NEUTRAL.keys() and said["repetition_penalty"] == 1.0 and said["n"] == 1
    assert params(open_job(str(source), chat)) == [SamplingParams(200)] * 2
    table = pa.table({"prompt": ["p"], "sampling_params": [json.dumps(NEUTRAL)]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert first_batch(open_job(str(tmp_path / "in.parquet"), chat)).rejected == ()


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_same_fields_with_another_value_are_refused_by_name(
    tmp_path: Path, chat: JobSettings, name: str
) -> None:
    """But for those that change no answer whatever they say."""
    others = {"n": 2, "tool_choice": "required", "guided_json": {"type": "object"}}
    others |= {"repetition_penalty": -7}
    value = others.get(name, 7 if name != "response_format" else {"type": "json_object"})
    source = write_lines(tmp_path / "in.jsonl", request("a", **{name: value}), request("b"))
    rejected = first_batch(open_job(str(source), chat)).rejected
    beside = {"parallel_tool_calls", "metadata", "user", "store", "stream_options"}
    # These are obeyed, and refused by their range later.
    beside |= {"repetition_penalty", "min_p", "n", "logprobs", "frequency_penalty", "min_tokens"}
    beside |= {"response_format", "guided_json"}
    assert [name in bad.message for bad in rejected] == [True] * (name not in beside)


@pytest.mark.fault(
    "columns and fields named like those of a request",
    injected="temperature, top_p, max_tokens, stop, n, tools, penalties ... as plain columns",
    outcome="obeyed; or the row is an error that names all of them; or named once as not used",
)
def test_columns_named_like_settings_are_obeyed(tmp_path: Path, chat: JobSettings) -> None:
    """Seen red: ignored in silence."""
    lines = {
        "prompt": ["a", "b"], "max_tokens": [5.0, None], "temperature": [Decimal("0.70"), None],
        "top_p": [0.5, None], "top_k": [3, None], "seed": [9, None], "stop": ["x", None],
        "ignore_eos": [True, None],
    }  # fmt: skip
    source = write(tmp_path / "in.parquet", **lines)
    job = open_job(str(source), chat)
    assert params(job) == [
        SamplingParams(5, 0.7, 0.5, 3, 9, ("x",), True), SamplingParams(200)
    ]  # fmt: skip
    (note,) = job.source.columns.describe()
    assert note.endswith("columns max_tokens, temperature, top_p, top_k, seed, stop, ignore_eos")
    assert note in job.describe()


def test_rules_of_a_row_are_obeyed(tmp_path: Path, chat: JobSettings) -> None:
    """They were refused, and a `repetition_penalty` of 1 was the model's own, whatever that was."""
    rules = {"repetition_penalty": 1.5, "min_p": 0.1, "no_repeat_ngram_size": 3, "typical_p": 0.9}
    lines = [
        request("line", **rules),
        {"id": "column", "prompt": "p", **rules},
        {"id": "cell", "prompt": "p", "sampling_params": rules},
    ]
    for number, line in enumerate(lines):
        source = write_lines(tmp_path / f"{number}.jsonl", line)
        (found,) = params(open_job(str(source), chat))
        assert json.loads(found.rules) == rules, line
    source = write_lines(tmp_path / "off.jsonl", request("a", repetition_penalty=1.0))
    batch = first_batch(open_job(str(source), chat))
    own = resolve_sampling(chat.sampling, {"repetition_penalty": 1.3}, batch.overrides[0])
    assert json.loads(own.rules) == {"repetition_penalty": 1.0}


def test_columns_named_like_settings_of_other_tools_are_named(
    tmp_path: Path, chat: JobSettings
) -> None:
    """Seen red: ignored in silence."""
    names = ["do_sample", "max_length", "stop_sequences", "system_prompt", "num_return_sequences"]
    source = write(tmp_path / "in.parquet", prompt=["p"], **{name: ["x"] for name in names})
    (note,) = open_job(str(source), chat).source.columns.describe()
    assert note.endswith(f"the columns {', '.join(names)}")


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_setting_that_is_no_number_says_so(tmp_path: Path, chat: JobSettings, name: str) -> None:
    """Seen red: " mean the same and differ"."""
    source = write(tmp_path / "in.parquet", prompt=["p"], sampling_params=[f'{{"{name}": NaN}}'])
    job = open_job(str(source), chat)
    (bad,) = job.preparation().prepare(first_batch(job)).rejected.values()
    assert bad.message.startswith(name)


def test_a_rule_of_the_wrong_kind_is_its_rows_error(tmp_path: Path, chat: JobSettings) -> None:
    lines = [{"prompt": "p", "repetition_penalty": 0}, {"prompt": "p", "no_repeat_ngram_size": 1.5}]
    for line in lines:
        job = open_job(str(write_lines(tmp_path / f"{len(line)}.jsonl", line)), chat)
        rows = list(job.preparation().prepare(first_batch(job)).rejected.values())
        assert [bad.error_type for bad in rows] == ["BadSamplingParams"]
        assert list(line)[1] in rows[0].message


def test_a_column_wins_over_sampling_params(tmp_path: Path, chat: JobSettings) -> None:
    cells = ['{"temperature": 0.5, "max_tokens": 9}'] * 2
    source = write(
        tmp_path / "in.parquet", prompt=["a", "b"], sampling_params=cells,
        temperature=[0.25, None], max_new_tokens=[3, None],
    )  # fmt: skip
    found = params(open_job(str(source), chat))
    assert [(p.temperature, p.max_new_tokens) for p in found] == [(0.25, 3), (0.5, 9)]


def test_columns_that_cannot_be_obeyed_are_refused_or_named(
    tmp_path: Path, chat: JobSettings
) -> None:
    lines = [
        {"prompt": "a", "n": 3, "tools": [{"type": "function"}], "temperature": "hot",
         "response_format": {"type": "json_object"}, "prompt_logprobs": 1},
        {"prompt": "b", "n": 1, "tools": [], "temperature": "cold",
         "response_format": {"type": "text"}, "prompt_logprobs": None},
    ]  # fmt: skip
    job = open_job(str(write_lines(tmp_path / "in.jsonl", *lines)), chat)
    (bad,) = first_batch(job).rejected
    assert (bad.row_index, bad.error_type) == (0, "BadSamplingParams")
    assert "prompt_logprobs" in bad.message
    obeyed, note = job.source.columns.describe()
    assert obeyed.endswith("in the columns response_format")
    assert note.startswith("not used") and note.endswith("columns n, temperature")


def test_a_column_that_a_template_prints_is_no_setting(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = write(tmp_path / "in.parquet", temperature=[21.5], n=[3], max_new_tokens=[7])
    (tmp_path / "t.j2").write_text("{{ temperature }} {{ n }} {{ max_new_tokens }}")
    job = open_job(str(source), echo_settings(tokenizer_folder, template=tmp_path / "t.j2"))
    assert first_batch(job).contents == ["21.5 3 7"]
    assert params(job) == [SamplingParams(7)] and job.source.columns.describe() == []


@pytest.mark.parametrize("nested", [False, True])
def test_text_without_its_mark_is_text_in_a_template(
    tmp_path: Path, tokenizer_folder: Path, nested: bool
) -> None:
    """Seen red: `b'tr\\xc3\\xa8s bon'`."""
    text = "très bon".encode()
    source = write(tmp_path / "in.parquet", x=[[text]] if nested else [text])
    (tmp_path / "t.j2").write_text("{{ x[0] }}" if nested else "{{ x }}")
    job = open_job(str(source), echo_settings(tokenizer_folder, template=tmp_path / "t.j2"))
    assert first_batch(job).contents == ["très bon"]


def test_sampling_without_ids_does_not_depend_on_the_files_name(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Seen red: a renamed file gave other answers. Rows of one prompt still differ."""
    settings = echo_settings(tokenizer_folder, temperature=1.0)
    keys = []
    for name, prompts in (("a", ["x", "x", "y"]), ("b", ["x", "x", "y"]), ("c", ["x", "z", "y"])):
        source = write(tmp_path / f"{name}.parquet", prompt=prompts)
        planned = plan_rows(open_job(str(source), settings))
        key = planned.plan.sequences.noise_key[planned.plan.sequence_of_row].tolist()
        assert len(set(key)) == 3
        keys.append(key)
    assert keys[0] == keys[1]
    assert [one == other for one, other in zip(keys[0], keys[2], strict=True)] == [
        True,
        False,
        True,
    ]


def test_convert_keeps_what_columns_ask_for(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", id=["a"], prompt=["p"], temperature=[0.5], n=[1])
    assert convert(Location(source), Location(tmp_path / "out.jsonl")) == 1
    body = json.loads((tmp_path / "out.jsonl").read_text())["body"]
    assert body == {"prompt": "p", "temperature": 0.5}
