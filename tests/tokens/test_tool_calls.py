"""How answers call tools is found in a model's own files, and calls are read from answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.prompt_settings import TokenSettings
from pipeline.tokens.tokenizer import PromptTokenizer
from pipeline.tokens.tool_calls import Answered, DeclaredCalls, TaggedCalls, ToolCall, find_format
from tests.saying_engine import TEMPLATE, save_thinking_tokenizer

CALLS = TaggedCalls("<tool_call>", "</tool_call>")
DECLARED: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant",
    "defaults": {"role": "assistant"},
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {
            "open": "<|call|>",
            "close": "<|end|>",
            "content": "json",
            "repeats": True,
        },
    },
}


def find_in(folder: Path, template: str) -> object:
    save_thinking_tokenizer(folder, template)
    return PromptTokenizer.load(str(folder), None, TokenSettings()).tool_calls


def test_tags_are_found_by_what_a_template_writes_of_a_call(tmp_path: Path) -> None:
    assert find_in(tmp_path, TEMPLATE) == CALLS


@pytest.mark.parametrize(
    "written",
    [
        "{{ call.function | tojson }}",
        "{{ '<tool_call>' + call.function.name + '</tool_call>' }}",
        "{{ raise_exception('no tools') }}",
        "{{ '<|im_start|>' + (call.function | tojson) + '<|im_end|>' }}",
    ],
)
def test_other_ways_to_write_a_call_are_none(tmp_path: Path, written: str) -> None:
    own = "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    assert own in TEMPLATE
    assert find_in(tmp_path, TEMPLATE.replace(own, written)) is None


def test_a_template_that_takes_no_tools_has_no_calls(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{% if tools %}", "{% if messages == 1 %}")
    assert find_in(tmp_path, template.replace("(tools | tojson)", "''")) is None


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ("No.", "No.", []),
        ('A<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>B', "AB", [("f", {"x": 1})]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name": "f", "parameters": "{}"}</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {', None, []),
        ("<tool_call>nothing</tool_call>", None, []),
        ('<tool_call>{"name": 5}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
        (
            '<tool_call>bad</tool_call>x<tool_call>{"name": "f"}</tool_call>',
            "<tool_call>bad</tool_call>x",
            [("f", {})],
        ),
    ],
)  # fmt: skip
def test_calls_are_read_and_what_is_none_stays_text(
    said: str, text: str | None, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    expected = tuple(ToolCall(name, json.dumps(arguments)) for name, arguments in calls)
    assert CALLS.read_all([said]) == [Answered(said if text is None else text, expected)]


def test_calls_of_a_declared_template_are_read_by_transformers(tmp_path: Path) -> None:
    save_thinking_tokenizer(tmp_path, "{{ messages }}", "<|call|>", "<|end|>")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.response_template = DECLARED
    found = find_format(tokenizer, lambda messages, given: "")
    assert isinstance(found, DeclaredCalls) and found.needs_control_tokens
    call = '<|call|>{"name": "f", "arguments": {"x": 1}}<|end|>'
    assert found.read_all([f"I look.{call}{call}", "No.", "<|call|>nothing<|end|>"]) == [
        Answered("I look.", (ToolCall("f", '{"x": 1}'),) * 2),
        Answered("No.", ()),
        Answered("<|call|>nothing<|end|>", ()),
    ]


def test_a_declared_template_that_transformers_does_not_take_declares_nothing(
    tmp_path: Path,
) -> None:
    save_thinking_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.response_template = {"fields": DECLARED["fields"]}
    assert find_format(tokenizer, lambda messages, given: "") is None
