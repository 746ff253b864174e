"""What rows and commands ask for beside their prompts: obeyed, or refused by name; nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import kvcoppice
from pipeline.cli.app import app
from pipeline.constraints import of_request, of_schema
from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import read_fields, read_messages, read_sampling
from pipeline.inputs.openai_batch import BadRequest, row_of_request
from pipeline.inputs.request_fields import BESIDE
from pipeline.job.answer_texts import Said, decode_answers
from pipeline.job.parsed import parsed_value
from pipeline.job.prepare import Limits, Preparation
from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import ChatPrompt, Content, PromptBatch
from pipeline.records import SamplingParams
from pipeline.run import run_job, validate_input
from pipeline.sampling_settings import SamplingSettings
from pipeline.storage.schema_types import JSON_TEXT
from pipeline.tokens.tokenizer import PromptTokenizer
from pipeline.tokens.tool_calls import TaggedCalls
from tests.attacks.test_sampling_fields import VALUES
from tests.inputs.test_request_fields import OPENAI_CHAT, OPENAI_TEXT
from tests.job.test_reasoning import lines
from tests.saying_engine import OPENING, TEMPLATE, Saying, save_thinking_tokenizer
from tests.test_structured import DEMO, LABEL, PROMPTS, settings_of
from tests.test_structured_kinds import write_thinker
from tests.tiny_job import answers, echo_settings, on, write_prompts

ASKED = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def request(name: str, value: Any) -> dict[str, Any]:
    """A line of a batch file with this field."""
    is_text = name in OPENAI_TEXT - OPENAI_CHAT
    content = {"prompt": "hello"} if is_text else {"messages": ASKED}
    url = "/v1/completions" if is_text else "/v1/chat/completions"
    body = {"model": "m"} | content | {name: value}
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def says_nothing(name: str, value: Any) -> bool:
    """Whether a request with this field is one without it."""
    if name in BESIDE:
        return True
    nothing: dict[str, list[Any]] = {
        "response_format": [{}, ""], "tools": [[], "[]"], "functions": [[], {}, ""],
        "function_call": ["none", "auto"], "tool_choice": ["none", "auto"], "echo": [False],
        "stream": [False], "suffix": ["", [], {}], "audio": ["", [], {}],
        "prediction": ["", [], {}], "modalities": [["text"]], "verbosity": ["medium"],
        "best_of": [1], "top_logprobs": [0, 0.0],
    }  # fmt: skip
    usual = nothing.get(name, [])
    return any(value == u and isinstance(value, bool) == isinstance(u, bool) for u in usual)


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, v in product(sorted(OPENAI_CHAT | OPENAI_TEXT), VALUES) if v is not None],
)
def test_no_field_of_a_request_is_dropped_in_silence(name: str, value: Any) -> None:
    try:
        row = row_of_request(request(name, value))
        found = read_sampling(row["sampling_params"] or "{}")
    except (BadRequest, BadCell) as error:
        assert name.replace("max_completion", "max") in str(error) or "surrogate" in str(error)
        return
    if name in ("model", "messages", "prompt"):
        return
    if not found and row["max_new_tokens"] is None:
        assert says_nothing(name, value), (name, value, row)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("response_format", [], "response_format must be a JSON object"),
        ("response_format", {"type": "json_object", "schema": LABEL}, "'schema'"),
        ("response_format", {"type": "text", "json_schema": {"schema": LABEL}}, "'json_schema'"),
        ("response_format", {"type": "json_object", "grammar": "x"}, "'grammar'"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": LABEL, "more": 1}},
         "a field that coppice does not know"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": LABEL}, "regex": ""},
         "'regex'"),
        ("structured_outputs", {"json": 0}, "structured_outputs"),
        ("structured_outputs", {"regex": False}, "structured_outputs"),
        ("structured_outputs", {"choice": False}, "structured_outputs"),
        ("structured_outputs", {"json_object": 1}, "json_object must be true or false"),
        ("structured_outputs", {"json_object": "yes"}, "json_object must be true or false"),
        ("structured_outputs", {"disable_additional_properties": True},
         "'disable_additional_properties'"),
        ("structured_outputs", {"json": LABEL, "whitespace_pattern": " "}, "'whitespace_pattern'"),
        ("guided_json", [], "guided_json"),
        ("guided_json", False, "guided_json"),
        ("guided_json", {"const": float("nan")}, "guided_json: it holds NaN"),
        ("guided_json", {"minimum": float("inf")}, "guided_json"),
        ("guided_json", {"const": "\ud800"}, "half a surrogate"),
        ("guided_json", {"properties": {"\udfff": {}}}, "half a surrogate"),
        ("guided_json", '{"const": "\\ud800"}', "half a surrogate"),
        ("guided_choice", {}, "guided_choice"),
        ("guided_regex", [], "guided_regex"),
        ("guided_regex", {}, "guided_regex"),
        ("guided_grammar", 5, "guided_grammar"),
        ("logit_bias", {"5": 1, "05": 2}, "logit_bias"),
        ("logit_bias", {"5_0": 1}, "logit_bias"),
        ("logit_bias", {" 5": 1}, "logit_bias"),
    ],
)  # fmt: skip
def test_what_is_meant_otherwise_is_refused_with_its_field(
    name: str, value: Any, told: str
) -> None:
    with pytest.raises(BadCell, match=told) as refused:
        read_fields({name: value})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("tools", "more", "told"),
    [
        ([{"type": "function", "function": {"name": "f", "strict": True}}], {}, "strict"),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], {}, "parameters"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], {}, "parameters"),
        ([TOOL], {"parallel_tool_calls": False}, "parallel_tool_calls"),
        ([TOOL], {"parallel_tool_calls": 0}, "parallel_tool_calls"),
        ([TOOL], {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ([TOOL], {"tool_choice": "required"}, "tool_choice"),
        ([TOOL], {"tool_choice": TOOL}, "tool_choice"),
    ],
)
def test_what_nothing_holds_calls_to_is_refused(
    tools: list[Any], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadCell, match=told):
        read_fields({"tools": tools} | more)


def test_a_column_of_parallel_tool_calls_is_read(tmp_path: Path) -> None:
    model = save_thinking_tokenizer(tmp_path / "model")
    frame = pl.DataFrame({"messages": [ASKED, ASKED], "tools": [json.dumps([TOOL])] * 2,
                          "parallel_tool_calls": [True, False]})  # fmt: skip
    frame.write_parquet(tmp_path / "p.parquet")
    found = validate_input(str(tmp_path / "p.parquet"), echo_settings(model, fail_on_error="100%"))
    assert ["parallel_tool_calls" in example["message"] for example in found["examples"]] == [True]


def unlike_json() -> list[Any]:
    endless: dict[str, Any] = {}
    endless["properties"] = {"a": endless}
    ring: list[Any] = []
    ring.append(tuple(ring) or ring)
    return [
        {"enum": {1, 2}}, {"enum": (x for x in "ab")}, {1: {"type": "null"}}, endless,
        {"properties": {1: {2: 3}}}, {"const": b"x"}, {"enum": ring}, {"const": object()},
        {"const": float("nan")}, {"const": "\ud800"}, {"const": 10**5_000},
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(unlike_json())))
def test_a_mapping_that_is_no_json_is_refused_in_a_sentence(tmp_path: Path, number: int) -> None:
    frame = pl.DataFrame({"prompt": ["A plum:"]})
    with pytest.raises(UsageError) as refused:
        kvcoppice.run(frame, tmp_path / "out", model=DEMO, schema=unlike_json()[number])
    assert len(str(refused.value)) < 600
    assert not (tmp_path / "out").exists()


class Calls(BaseModel):
    act: Callable[[int], int]


def test_a_model_of_pydantic_without_a_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Calls has no JSON schema"):
        kvcoppice.run(pl.DataFrame({"prompt": ["a"]}), tmp_path / "out", model=DEMO, schema=Calls)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--json-schema", "/dev/zero", "too large"),
        ("--grammar", "/dev/zero", "too large"),
        ("--json-schema", ".", "cannot read"),
        ("--json-schema", "x" * 5_000, "cannot read"),
        ("--json-schema", '{"const": "\\ud800"}', "half a surrogate"),
        ("--json-schema", '{"enum": [NaN]}', "NaN"),
        ("--json-schema", "", "cannot read"),
        ("--grammar", "", "cannot read|not empty"),
        ("--regex", "(?P<x>a)\\1", "--regex"),
        ("--regex", "a\ud800", "surrogate"),
        ("--n", "0", r"\bn\b"), ("--n", "1000000", r"\bn\b"),
        ("--logprobs", "100", r"\blogprobs\b"),
        ("--logprobs", "-1", r"\blogprobs\b"), ("--thinking-budget", "-1", r"\bthinking-budget\b"),
        ("--presence-penalty", "nan", r"\bpresence-penalty\b"),
        ("--frequency-penalty", "3", r"\bfrequency-penalty\b"),
        ("--chat-template-kwargs", "messages=1", "chat-template-kwargs"),
        ("--reasoning-tags", "<a>", "reasoning-tags"),
        ("--generation-options", "logit_bias={\"999999\": 1}", "logit_bias"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_kept_is_one_sentence_and_exit_code_2(
    tmp_path: Path, flag: str, value: str, told: str
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])
    called = CliRunner().invoke(
        app, ["run", str(prompts), "-o", str(tmp_path / "out"), "--model", str(DEMO),
              "--progress", "none", flag, value],
    )  # fmt: skip
    said = f"{called.output} {called.exception}"
    assert called.exit_code == 2 or isinstance(called.exception, UsageError), said
    assert "Traceback" not in said
    assert re.search(told, re.sub(r"[\s│|]+", " ", said)), said
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_schema_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LABEL).encode())
    assert settings_of(json_schema=str(path)).sampling.constraint == of_schema(LABEL)


def test_a_path_that_looks_like_a_grammar_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "start: a.lark"
    path.write_text('start: "a"')
    assert settings_of(grammar=str(path)).sampling.grammar == 'start: "a"'


def test_schemas_in_lines_keep_their_order_and_their_numbers(tmp_path: Path) -> None:
    first = {"type": "object", "properties": {"b": {"enum": [1]}, "a": {"enum": [2]}},
             "required": ["b", "a"]}  # fmt: skip
    second = {"type": "object", "properties": {"a": {"enum": [1.5]}, "b": {"const": None}},
              "required": ["a", "b"]}  # fmt: skip
    for field, flat in (("form", {"json_schema_column": "form"}), ("guided_json", {}),
                        ("sampling_params", {})):  # fmt: skip
        said = [{"guided_json": s} if field == "sampling_params" else s for s in (first, second)]
        rows = [{"prompt": PROMPTS[i], field: own} for i, own in enumerate(said)]
        path = tmp_path / f"{field}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_job(str(path), tmp_path / field, settings_of(**flat))
        texts = answers(tmp_path / field)["generated_text"].to_list()
        assert texts == ['{"b":1,"a":2}', '{"a":1.5,"b":null}'], field


@pytest.fixture(scope="module")
def thinks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_thinking_tokenizer(tmp_path_factory.mktemp("thinks"))


def test_a_tag_that_a_person_writes_frees_no_answer_from_its_form(tmp_path: Path) -> None:
    model = write_thinker(tmp_path / "model")
    texts = ["what is <think> for?", "is it <think>so", "hm"]
    prompts = write_prompts(tmp_path / "p.parquet", texts)
    for engine in ("prefix", "naive"):
        settings = settings_of(model=str(model), engine=engine, regex="(yes|no), [a-c]{2}")
        run_job(str(prompts), tmp_path / engine, settings)
        rows = answers(tmp_path / engine)
        assert rows["generated_text"].str.contains("^(yes|no), [a-c]{2}$").all(), engine


def test_what_looks_like_a_tag_within_a_form_is_of_the_answer(thinks: Path) -> None:
    tokenizer = PromptTokenizer.load(str(thinks), None, TokenSettings())
    tags = tokenizer.find_reasoning(True)
    text = '{"a":"so </think> it is","b":"<think>"}'
    ids = tuple(tokenizer.encode_word(text))
    assert tags is not None and set(tags.end_ids) <= set(ids)
    params = SamplingParams(constraint=of_schema({"type": "object"}))
    said = Said(tokenizer.encode_word("hm"), ids, "stop", params)
    (parts,) = decode_answers(tokenizer.answers, tags, [said], ())
    assert parts == (text, None, 0)

    class Job:
        reasoning = tags

    Job.tokenizer = tokenizer  # type: ignore[attr-defined]
    assert parsed_value(Job, JSON_TEXT, said, text) == text  # type: ignore[arg-type]
    opened = said._replace(prompt=tokenizer.encode_word("hm<think>\n"))
    (parts,) = decode_answers(tokenizer.answers, tags, [opened], ())
    assert parts.reasoning == '{"a":"so'


@pytest.mark.parametrize(
    ("shown", "value"),
    [({"skip_special_tokens": False}, 12), ({"include_stop_str_in_output": True}, 12)],
)
def test_what_a_row_wants_to_see_changes_no_value(
    thinks: Path, shown: dict[str, Any], value: int
) -> None:
    from pipeline.request_rules import write_asked

    tokenizer = PromptTokenizer.load(str(thinks), None, TokenSettings())
    ids = tuple(tokenizer.encode_word("12<|im_end|>"))
    params = SamplingParams(constraint=of_schema({"type": "integer"}), asked=write_asked(shown))
    said = Said(tokenizer.encode_word("hm"), ids, "stop", params)

    class Job:
        reasoning = None

    Job.tokenizer = tokenizer  # type: ignore[attr-defined]
    assert parsed_value(Job, JSON_TEXT, said, "12<|im_end|>") == "12"  # type: ignore[arg-type]


ODD_CALLS = [
    '{"name": "\\ud800", "arguments": {}}', '{"name": "find", "arguments": {"q": "\\udfff"}}',
    '{"name": "find", "arguments": {"\\ud800": 1}}', '{"name": "find", "arguments": {"q": NaN}}',
    '{"name": "find", "arguments": "{\\"q\\": Infinity}"}', '{"name": "find", "arguments": 5}',
    '{"name": "find", "arguments": {"q": 1e999}}', '{"name": 5}', "{", "[]", "",
    '{"name": "find", "arguments": {"q": ' + "9" * 5_000 + "}}",
]  # fmt: skip


def test_a_call_that_is_no_json_or_no_text_stays_text(thinks: Path, tmp_path: Path) -> None:
    said = {i: f"so <tool_call>{call}</tool_call>" for i, call in enumerate(ODD_CALLS)}
    said[len(said)] = '<tool_call>{"name": "find", "arguments": {"q": "é😀"}}</tool_call>'
    deep = '{"a":' * 900 + "1" + "}" * 900  # a call or text, by how deep Python goes
    said[len(said)] = f'<tool_call>{{"name": "find", "arguments": {deep}}}</tool_call>'
    said[len(said)] = "<tool_call>" * 2_000 + "</tool_call>" * 2_000
    source = lines(tmp_path / "p.jsonl", *[{"tools": [TOOL]}] * len(said))
    settings = echo_settings(thinks, fail_on_error="100%")
    run_job(source, tmp_path / "out", settings, make_engine=on(Saying(thinks, said)))
    rows = answers(tmp_path / "out").to_dicts()
    assert {row["status"] for row in rows} == {"ok"}
    for row, call in zip(rows, ODD_CALLS, strict=False):
        assert row["tool_calls"] == [] and row["generated_text"].endswith(f"{call}</tool_call>")
    (whole,) = rows[len(ODD_CALLS)]["tool_calls"]
    assert json.loads(whole["arguments"]) == {"q": "é😀"}


def test_half_a_surrogate_pair_in_an_earlier_call_is_its_rows_error(thinks: Path) -> None:
    call = {"function": {"name": "find", "arguments": '{"q": "\\ud800"}'}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for cell in (messages, json.dumps(messages)):
        with pytest.raises(BadCell, match="surrogate"):
            read_messages(cell)


def test_declared_calls_read_nothing_that_is_no_text() -> None:
    form = TaggedCalls("<c>", "</c>")
    (found,) = form.read_all(['<c>{"name": "a", "arguments": {"x": "\\ud83d\\ude00"}}</c>'])
    assert json.loads(found.calls[0].arguments) == {"x": "😀"}


def test_tools_and_a_schema_contradict_each_other(thinks: Path) -> None:
    tokenizer = PromptTokenizer.load(str(thinks), None, TokenSettings())
    preparation = Preparation(tokenizer, SamplingSettings(), {}, Limits(512, "error"))
    asked: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object"}, "tool_choice": "none"},
        {"guided_regex": "[^a]{3}"},
        {},
    ]
    overrides, contents = [], list[Content | None]()
    for fields in asked:
        found = read_fields({"tools": [TOOL]} | fields)
        given = found.pop("given", None)
        contents.append(ASKED if given is None else ChatPrompt(ASKED, str(given)))
        overrides.append(found)
    batch = PromptBatch(0, list("abcd"), contents, overrides, [None] * 4)
    rejected = preparation.prepare(batch).rejected
    assert list(rejected) == [0]
    assert "tools" in rejected[0].message and "tool_choice: none" in rejected[0].message


@pytest.mark.parametrize(
    ("template", "ends", "is_refused"),
    [
        (TEMPLATE, "<think>\n\n</think>\n\n", False),
        (OPENING.split("{% if enable_thinking")[0] + "<think>{% endif %}{# </think> #}", "", True),
        (TEMPLATE.split("{% if enable_thinking")[0] + "{% endif %}", "assistant\n", False),
        (TEMPLATE.replace("enable_thinking", "thinking"), "<think>\n\n</think>\n\n", False),
        (TEMPLATE + "{{ reasoning_effort }}", "none", False),
    ],
)
def test_no_effort_is_no_thinking_or_refused(
    tmp_path: Path, template: str, ends: str, is_refused: bool
) -> None:
    folder = save_thinking_tokenizer(tmp_path, template)
    tokenizer = PromptTokenizer.load(str(folder), None, TokenSettings())
    given = str(read_fields({"reasoning_effort": "none"})["given"])
    prompt = ChatPrompt(ASKED, given)
    batch = tokenizer.encode_batch([prompt])
    if is_refused:
        assert "reasoning_effort" in batch.errors[0]
        return
    assert not batch.errors
    assert tokenizer.decode_batch([batch.flat.tolist()], specials=True)[0].endswith(ends)
    assert tokenizer.render(prompt).endswith(ends)


def test_no_effort_asks_nothing_of_a_prompt_without_a_template(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2], reasoning_effort=["none", None])
    run_job(str(prompts), tmp_path / "out", settings_of(max_new_tokens=3))
    assert answers(tmp_path / "out")["status"].to_list() == ["ok", "ok"]


def test_fields_that_mean_nothing_are_told_apart_from_wrong_ones() -> None:
    assert of_request("response_format", {}) is None
    assert of_request("guided_choice", []) is None
    assert of_request("structured_outputs", {"json_object": False, "regex": None}) is None
    assert of_request("structured_outputs", {"disable_fallback": True, "regex": "a"}) is not None
