"""OpenAI batch files and plain JSON lines, there and back, and every line that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CoppiceError, InputError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.inputs.openai_batch import BadRequest, request_of_row, row_of_request
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from tests.tiny_job import echo_settings

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? Ünïcode"}]


def request(name: str = "a", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": CHAT} | body,
    }


def write_lines(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


bodies = st.fixed_dictionaries(
    {},
    optional={
        "max_completion_tokens": st.integers(1, 99),
        "temperature": st.floats(0, 2),
        "top_p": st.sampled_from([0.5, 1.0]),
        "seed": st.integers(0, 9),
        "stop": st.lists(st.text(min_size=1), min_size=1),
    },
)


@given(bodies, st.text())
def test_a_request_comes_back_as_it_was(body: dict[str, Any], text: str) -> None:
    chat = request(**body, messages=[{"role": "user", "content": text, "name": "x"}])
    assert request_of_row(row_of_request(chat)) == chat
    if "max_completion_tokens" in body:
        body = body | {"max_tokens": body["max_completion_tokens"]}
        del body["max_completion_tokens"]
    plain = {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": text} | body,
    }
    assert request_of_row(row_of_request(plain)) == plain


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"echo": True}, "asks for echo"),
        ({"prompt_logprobs": 1}, "asks for prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "each with a name"),
        ({"messages": None}, "no messages"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"max_tokens": "5"}, "a whole number"),
        ({"max_tokens": True}, "a whole number"),
        ({"max_tokens": [5]}, "a whole number"),
        ({"max_tokens": 2**70}, "a whole number"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate"),
        ({"stop": "\ud800"}, "half a surrogate"),
        ({"model": 5}, "model must be text"),
    ],
)
def test_what_would_change_the_answer_is_refused(body: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        row_of_request(request(**body))


@pytest.mark.parametrize("prompt", [["one", "two"], [5, 6]])
def test_a_completion_of_several_prompts_or_of_ids_is_refused(prompt: list[Any]) -> None:
    line = request() | {"url": "/v1/completions", "body": {"prompt": prompt}}
    with pytest.raises(BadRequest, match="^prompt must be one text"):
        row_of_request(line)


def test_what_means_as_usual_is_dropped() -> None:
    usual: dict[str, Any] = {
        "stream": False,
        "length_penalty": 1.0,
        "user": "u",
        "watermarking": False,
        "echo": False,
    }
    assert row_of_request(request(**usual)) == row_of_request(request())


def test_what_a_run_obeys_is_kept_under_its_own_name() -> None:
    said: dict[str, Any] = {
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"5": 1},
        "min_tokens": 1,
    }
    row = row_of_request(request(**said, presence_penalty=None))
    assert json.loads(row["sampling_params"]) == said
    assert request_of_row(row | {"custom_id": "a"})["body"].items() >= said.items()


def test_a_batch_file_becomes_rows_that_a_run_takes_and_comes_back(tmp_path: Path) -> None:
    requests = [request("a", temperature=0.5, max_completion_tokens=7), request("b", stop=["."])]
    lines = write_lines(tmp_path / "in.jsonl", requests[0], "", requests[1])
    assert convert(Location(lines), Location(tmp_path / "rows.parquet")) == 2
    source = open_source(Location(tmp_path / "rows.parquet"), ReadSettings())
    (batch,) = source.iter_prompts()
    assert batch.ids == ["a", "b"] and not batch.rejected
    assert batch.contents == [CHAT, CHAT]
    assert batch.overrides == [{"temperature": 0.5, "max_new_tokens": 7}, {"stop": (".",)}]
    assert convert(Location(tmp_path / "rows.parquet"), Location(tmp_path / "back.jsonl")) == 2
    assert read_lines(tmp_path / "back.jsonl") == requests


def test_plain_lines_keep_their_columns(tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "in.jsonl",
        {"id": "x", "prompt": "one", "more": 1},
        {"id": "y", "prompt": "two", "messages": None},
    )
    assert convert(Location(lines), Location(tmp_path / "rows.parquet")) == 2
    frame = pl.read_parquet(tmp_path / "rows.parquet")
    assert frame["prompt"].to_list() == ["one", "two"] and frame["more"].to_list() == [1, None]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no line"),
        (["{"], "line 1 of .* is not a JSON object"),
        (['{"id": 1}', "[1]"], "line 2 of .* is not a JSON object"),
        ([request(), {"custom_id": 3, "body": {}}], "line 2 of .*custom_id must be text"),
        ([request(), request(echo=True)], "line 2 of .*asks for echo"),
        (
            [request(), {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "p"}}],
            "line 2 of .*another kind",
        ),
        ([request() | {"url": "/v1/embeddings"}], "line 1 of .*url must be"),
        (['{"prompt": "a"}', '{"prompt": [1]}'], "field 'prompt' of line 2 .* does not fit"),
        (['{"prompt": {"a": 1}}', '{"prompt": "a"}'], "field 'prompt' of line 2 .* does not fit"),
        (['{"id": 1}', '{"id": "1"}'], "field 'id' .* does not fit into a column"),
        ([json.dumps({"id": 2**70})], "field 'id' .* does not fit"),
        ([json.dumps({"id": "\ud800"})], "field 'id' .* does not fit"),
        (['{"id": 1, "temperature": NaN}'], "line 1 of .* holds NaN, which JSON does not have"),
        (['{"id": 1, "x": [-Infinity]}'], "line 1 of .* holds -Infinity"),
        (['{"custom_id": "a", "body": null}'], "line 1 of .*body an object"),
    ],
)
def test_a_line_that_cannot_be_taken_is_named_and_nothing_is_left(
    tmp_path: Path, lines: list[Any], said: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", *lines)
    with pytest.raises(InputError, match=said):
        convert(Location(source), Location(tmp_path / "rows.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_field_with_lists_or_objects_of_two_types_is_json_text(tmp_path: Path) -> None:
    values = [[{"c": "x"}], [{"c": ["y"]}], None, {"c": 1}, "x", 5]
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": "p", "t": value} for value in values))
    assert convert(Location(source), Location(tmp_path / "rows.parquet")) == 6
    frame = pl.read_parquet(tmp_path / "rows.parquet")
    assert [text and json.loads(text) for text in frame["t"]] == values


def test_lists_of_thirty_levels_are_rows(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", f'{{"prompt": "p", "x": {"[" * 30}{"]" * 30}}}')
    assert convert(Location(source), Location(tmp_path / "rows.parquet")) == 1
    assert (
        open_source(Location(tmp_path / "rows.parquet"), ReadSettings())
        .take(np.array([0]))
        .num_rows
        == 1
    )


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="line 2 of .*UTF-8"):
        convert(Location(tmp_path / "in.jsonl"), Location(tmp_path / "rows.parquet"))


def test_what_a_row_says_wrongly_is_left_to_the_run(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]
    lines = [request("a", messages=[]), request("b", temperature="hot"), request("c", stop=5)]
    lines += [request("d", messages=parts), request("e", max_tokens=-1), request("f")]
    source = write_lines(tmp_path / "in.jsonl", *lines)
    assert convert(Location(source), Location(tmp_path / "rows.parquet")) == 6
    (batch,) = open_source(Location(tmp_path / "rows.parquet"), ReadSettings()).iter_prompts()
    assert [bad.row_index for bad in batch.rejected] == [0, 1, 2, 3]
    assert batch.overrides[4] == {"max_new_tokens": -1}  # refused with the ranges, when planning


def test_columns_that_only_share_a_name_with_a_request_change_nothing(tmp_path: Path) -> None:
    rows = {"id": ["a"], "prompt": ["x"], "url": ["https://example.com"], "model": [1]}
    pl.DataFrame(rows).write_parquet(tmp_path / "in.parquet")
    assert convert(Location(tmp_path / "in.parquet"), Location(tmp_path / "out.jsonl")) == 1
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert line == {
        "custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}
    }  # fmt: skip
    assert convert(Location(tmp_path / "out.jsonl"), Location(tmp_path / "back.parquet")) == 1


def test_a_mark_of_byte_order_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\r\n')
    assert convert(Location(tmp_path / "in.jsonl"), Location(tmp_path / "rows.parquet")) == 1


def test_answers_to_a_named_column_of_conversations_are_those_of_chats(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Though there is a column `prompt`, which alone would make them completions."""
    rows = {"id": ["a"], "talk": [json.dumps(CHAT)], "prompt": ["of something else"]}
    pl.DataFrame(rows).write_parquet(tmp_path / "in.parquet")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    kinds = {"talk": "chat.completion", "prompt": "text_completion"}
    for column, kind in kinds.items():
        said = {"messages_column": "talk"} if column == "talk" else {"prompt_column": "prompt"}
        settings = echo_settings(tokenizer_folder, chat_template=tmp_path / "t.jinja", **said)
        run_job(str(tmp_path / "in.parquet"), tmp_path / column, settings)
        convert(Location(tmp_path / column), Location(tmp_path / f"{column}.jsonl"))
        (line,) = read_lines(tmp_path / f"{column}.jsonl")
        assert line["response"]["body"]["object"] == kind


def test_a_row_that_no_run_would_take_is_not_turned_into_a_request(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a", "b"], "prompt": ["p", None]}).write_parquet(tmp_path / "in.parquet")
    with pytest.raises(InputError, match="row 1 of"):
        convert(Location(tmp_path / "in.parquet"), Location(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("source", "target"), [("a.jsonl", "b.jsonl"), ("a.parquet", "b.csv")])
def test_other_endings_are_a_usage_error(tmp_path: Path, source: str, target: str) -> None:
    with pytest.raises(UsageError, match="convert from"):
        convert(Location(tmp_path / source), Location(tmp_path / target))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_is_there_stays_unless_it_is_to_be_overwritten(
    tmp_path: Path, overwrite: bool
) -> None:
    source = write_lines(tmp_path / "in.jsonl", request())
    target = tmp_path / "rows.parquet"
    target.write_bytes(b"mine")
    if overwrite:
        assert convert(Location(source), Location(target), overwrite=True) == 1
        assert pl.read_parquet(target)["custom_id"].to_list() == ["a"]
        return
    with pytest.raises(UsageError, match="is there already; .*, or add --overwrite$"):
        convert(Location(source), Location(target))
    assert target.read_bytes() == b"mine"


def test_nothing_is_converted_onto_itself(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a"], "prompt": ["p"]}).write_parquet(tmp_path / "rows")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "rows")
    before = (tmp_path / "rows").read_bytes()
    with pytest.raises(UsageError, match="is there already; choose another name$"):
        convert(Location(tmp_path / "rows"), Location(tmp_path / "rows.jsonl"), overwrite=True)
    assert (tmp_path / "rows").read_bytes() == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for source, target in (("a.jsonl", "b.parquet"), ("a.parquet", "b.jsonl")):
        with pytest.raises(CoppiceError, match="a\\."):
            convert(Location(tmp_path / source), Location(tmp_path / target))


def test_one_text_in_a_list_is_a_prompt_and_several_are_none() -> None:
    def row(prompt: Any) -> dict[str, Any]:
        body = {"model": "m", "prompt": prompt}
        return row_of_request({"custom_id": "a", "url": "/v1/completions", "body": body})

    assert row(["hello"])["prompt"] == "hello"
    for prompt in (["a", "b"], [1, 2], [[1]], []):
        with pytest.raises(BadRequest, match="one text, not several or token ids"):
            row(prompt)


def test_tools_of_a_table_are_tools_of_its_requests(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "find"}}]
    call = {"type": "function", "function": {"name": "find", "arguments": '{"q": 1}'}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    table = {
        "custom_id": ["a"],
        "messages": [json.dumps(messages)],
        "tools": [json.dumps(tools)],
        "chat_template_kwargs": ['{"enable_thinking": false}'],
    }
    pl.DataFrame(table).write_parquet(tmp_path / "p.parquet")
    convert(Location(str(tmp_path / "p.parquet")), Location(str(tmp_path / "p.jsonl")))
    body = json.loads((tmp_path / "p.jsonl").read_text())["body"]
    assert (body["messages"], body["tools"]) == (messages, tools)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
