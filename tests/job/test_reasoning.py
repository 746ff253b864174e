"""Runs of a model that thinks: columns of what was thought, and of the tools that answers call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RunDirectoryError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.run import plan_job, run_job, validate_input
from pipeline.settings import JobSettings
from tests.saying_engine import OPENING, TEMPLATE, Saying, save_thinking_tokenizer
from tests.tiny_job import answers, echo_settings, on

SAID = {
    0: "<think>\nTwo and two\n</think>\n\nFour.",
    1: "Four.",
    2: "<think>\nI go on and on",
}
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_thinking_tokenizer(tmp_path_factory.mktemp("thinks"))


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def write(path: Path, **columns: list[Any]) -> str:
    pl.DataFrame({"id": [f"r{i}" for i in range(len(next(iter(columns.values()))))], **columns},
                 strict=False).write_parquet(path)  # fmt: skip
    return str(path)


def lines(path: Path, *bodies: dict[str, Any]) -> str:
    """A batch file of chat completions."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"r{number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": "m", "messages": ask(f"2 + {number}?")[0]} | body,
                }
            )
            + "\n"
            for number, body in enumerate(bodies)
        )
    )
    return str(path)


def settings_of(model: Path, **flat: Any) -> JobSettings:
    return echo_settings(model, fail_on_error="100%", **flat)


def test_answers_and_what_was_thought_are_two_columns(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "p.parquet", messages=ask("2 + 2?", "and?", "so?"))
    engine = Saying(model, SAID, cut=[2])
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows["generated_text"].to_list() == ["Four.", "Four.", ""]
    assert rows["reasoning"].to_list() == ["Two and two", None, "I go on and on"]
    thought = [len(engine.encode(text)) for text in ("<think>\nTwo and two\n</think>", "", SAID[2])]
    assert rows["reasoning_tokens"].to_list() == thought
    assert rows["completion_tokens"][0] == len(engine.encode(SAID[0] + "<|im_end|>"))
    assert "| `reasoning` | string |" in (tmp_path / "out" / "README.md").read_text()


def test_reasoning_that_the_template_opens_is_known(tmp_path: Path) -> None:
    model = save_thinking_tokenizer(tmp_path / "opens", OPENING)
    source = write(tmp_path / "p.parquet", messages=ask("2 + 2?", "so?"))
    engine = Saying(model, {0: "Two\n</think>\n\nFour.", 1: "I was cut"}, cut=[1])
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows.select("reasoning", "generated_text").rows() == [
        ("Two", "Four."),
        ("I was cut", ""),
    ]
    assert engine.prompts[0].endswith("<think>\n")


def test_reasoning_can_be_left_in_the_text(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "p.parquet", messages=ask("2 + 2?"))
    settings = settings_of(model, reasoning_tags="none")
    run_job(source, tmp_path / "out", settings, make_engine=on(Saying(model, SAID)))
    rows = answers(tmp_path / "out")
    assert rows["generated_text"][0] == SAID[0] and "reasoning" not in rows.columns
    with pytest.raises(RunDirectoryError, match="another"):
        run_job(source, tmp_path / "out", settings_of(model), make_engine=on(Saying(model, SAID)))


def test_prompts_that_no_template_writes_have_reasoning_where_tags_are_named(
    model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "p.parquet", prompt=["2 + 2?"])
    settings = settings_of(model)
    run_job(source, tmp_path / "plain", settings, make_engine=on(Saying(model, SAID)))
    assert "reasoning" not in answers(tmp_path / "plain").columns
    settings = settings_of(model, reasoning_tags="<think>,</think>")
    run_job(source, tmp_path / "out", settings, make_engine=on(Saying(model, SAID)))
    assert answers(tmp_path / "out")["reasoning"].to_list() == ["Two and two"]


def test_a_tag_that_the_tokenizer_lacks_is_refused_before_anything_runs(
    model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "p.parquet", messages=ask("2 + 2?"))
    with pytest.raises(UsageError, match="no token '<thought>'"):
        plan_job(source, settings_of(model, reasoning_tags="<thought>,</think>"))


def test_a_column_of_the_input_called_reasoning_is_carried_beside_ours(
    model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "p.parquet", messages=ask("2 + 2?"), reasoning=["mine"])
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(Saying(model, SAID)))
    rows = answers(tmp_path / "out")
    assert rows.select("reasoning", "input_reasoning").rows() == [("Two and two", "mine")]


def test_template_arguments_of_the_job_and_of_rows_steer_the_template(
    model: Path, tmp_path: Path
) -> None:
    own = [None, '{"enable_thinking": true}', '{"enable_thinking": false}']
    source = write(
        tmp_path / "p.parquet", messages=ask("a", "b", "c"), chat_template_kwargs=own
    )  # fmt: skip
    engine = Saying(model, dict.fromkeys(range(3), "Yes."))
    settings = settings_of(model, chat_template_kwargs=["enable_thinking=false"])
    run_job(source, tmp_path / "out", settings, make_engine=on(engine))
    opened = [engine.prompts[row].endswith("<think>\n\n</think>\n\n") for row in range(3)]
    assert opened == [True, False, True]
    assert answers(tmp_path / "out")["status"].to_list() == ["ok"] * 3


def test_arguments_that_the_template_does_not_take_are_refused_by_name(
    model: Path, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "p.parquet",
        messages=ask("a", "b", "c"),
        reasoning_effort=["high", "none", None],
        chat_template_kwargs=[None, '{"enable_thinkin": false}', '{"messages": []}'],
    )
    found = validate_input(source, settings_of(model))
    said = {example["id"]: example["message"] for example in found["examples"]}
    assert "gives reasoning_effort, which the chat template does not take" in said["r0"]
    assert "gives enable_thinkin, which" in said["r1"]
    assert "messages is not to be given to a chat template" in said["r2"]
    with pytest.raises(UsageError, match="takes no 'enable_thinkin'"):
        plan_job(source, settings_of(model, chat_template_kwargs=["enable_thinkin=false"]))


def test_tools_are_in_the_prompt_and_calls_in_a_column(model: Path, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "find", "arguments": {"q": "x"}}\n</tool_call>'
    source = lines(
        tmp_path / "p.jsonl",
        {"tools": [FIND]},
        {"tools": [FIND], "tool_choice": "none"},
        {},
        {"tools": [FIND], "tool_choice": "auto", "parallel_tool_calls": True},
    )
    said = {0: f"<think>Hm</think>I look.\n{call}\n{call}", 1: call, 2: call, 3: "No need."}
    engine = Saying(model, said)
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert ["find" in engine.prompts[row] for row in (0, 1, 3)] == [True, False, True]
    found = [{"name": "find", "arguments": '{"q": "x"}'}] * 2
    assert rows["tool_calls"].to_list() == [found, None, None, []]
    assert rows["generated_text"].to_list() == ["I look.", call, call, "No need."]
    assert rows["reasoning"][0] == "Hm"
    convert(Location(str(tmp_path / "out")), Location(str(tmp_path / "answers.jsonl")))
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    choices = [line["response"]["body"]["choices"][0] for line in told]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "stop", "stop"]
    message = choices[0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("I look.", "Hm")
    assert [call["function"] for call in message["tool_calls"]] == found
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    usage = told[0]["response"]["body"]["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == rows["reasoning_tokens"][0] > 0


def test_a_conversation_with_calls_is_written_by_the_template(model: Path, tmp_path: Path) -> None:
    function = {"name": "find", "arguments": '{"q": "<|im_end|>"}'}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    source = lines(tmp_path / "p.jsonl", {"messages": messages, "tools": [FIND]})
    engine = Saying(model, {0: "Four."})
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    prompt = engine.prompts[0]
    assert '{"name": "find", "arguments": {"q": "<|im_end|>"}}' in prompt
    ends = [token for token in engine.prompt_ids[0] if [token] == engine.encode("<|im_end|>")]
    assert len(ends) == 4, "of tools, user, assistant and tool; that of the argument is text"


def test_what_cannot_be_done_with_tools_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    source = lines(
        tmp_path / "p.jsonl",
        {},
        {"tools": [FIND], "tool_choice": "required"},
        {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "find"}}},
        {"tools": [FIND], "parallel_tool_calls": False},
        {"tools": "find"},
        {"functions": [FIND["function"]]},
    )
    engine = Saying(model, {0: "Yes."})
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok", *["error"] * 5]
    said = rows["error_message"].to_list()[1:]
    named = ["tool_choice", "tool_choice", "parallel_tool_calls", "tools", "functions"]
    assert all(name in message for name, message in zip(named, said, strict=True))


def test_tools_are_refused_where_no_template_says_how_they_are_called(tmp_path: Path) -> None:
    deaf = TEMPLATE.replace("{% for call in message.tool_calls %}", "{% for call in [] %}")
    model = save_thinking_tokenizer(tmp_path / "deaf", deaf)
    source = lines(tmp_path / "p.jsonl", {"tools": [FIND]}, {})
    engine = Saying(model, {1: "Yes."})
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["error", "ok"]
    assert "do not say how an answer calls one" in rows["error_message"][0]
    assert "tool_calls" not in rows.columns


def test_tools_of_rows_in_a_table_are_taken_from_their_column(model: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "p.parquet", messages=ask("a", "b"), tools=[json.dumps([FIND]), None]
    )  # fmt: skip
    call = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
    engine = Saying(model, {0: call, 1: call})
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    assert rows["tool_calls"].to_list() == [[{"name": "find", "arguments": "{}"}], None]
    assert rows["generated_text"].to_list() == ["", call]


class SayingTwice(Saying):
    """The second sample of a row thinks something else."""

    def text(self, row: int, sample: int) -> str:
        return "<think>\nAgain\n</think>\n\n4." if sample else self._said[row]


def test_each_sample_has_what_was_thought_before_it(model: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "p.jsonl", {"n": 2, "temperature": 1.0}, {})
    engine = SayingTwice(model, SAID)
    run_job(source, tmp_path / "out", settings_of(model), make_engine=on(engine))
    rows = answers(tmp_path / "out")
    thought = [len(engine.encode(text)) for text in ("<think>\nTwo and two\n</think>",
                                                     "<think>\nAgain\n</think>")]  # fmt: skip
    assert [(s["generated_text"], s["reasoning"], s["reasoning_tokens"]) for s in rows["samples"][0]
            ] == [("Four.", "Two and two", thought[0]), ("4.", "Again", thought[1])]  # fmt: skip
    assert rows["reasoning"].to_list() == ["Two and two", None]
    convert(Location(str(tmp_path / "out")), Location(str(tmp_path / "answers.jsonl")))
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    body = told[0]["response"]["body"]
    said = [choice["message"].get("reasoning_content") for choice in body["choices"]]
    assert said == ["Two and two", "Again"]
    counted = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert counted == sum(thought)
