"""Reasoning is told from answers by tags that are tokens, wherever a template opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.errors import UsageError
from pipeline.prompt_settings import TokenSettings
from pipeline.tokens.answer_text import AnswerText
from pipeline.tokens.reasoning import (
    AnswerParts,
    ReasoningTags,
    decode_parts,
    find_tags,
    named_tags,
)
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.saying_engine import TEMPLATE, save_thinking_tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_thinking_tokenizer(tmp_path_factory.mktemp("thinks"), TEMPLATE, *HARMONY)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tags(tokenizer: Any) -> ReasoningTags:
    found = find_tags(tokenizer, TEMPLATE)
    assert found is not None
    return found


def parts(
    tokenizer: Any, tags: ReasoningTags | None, prompt: str, answer: str, *stop: str
) -> AnswerParts:
    backend = tokenizer.backend_tokenizer
    ids = [backend.encode(text, add_special_tokens=False).ids for text in (prompt, answer)]
    (found,) = decode_parts(AnswerText(backend), tags, [ids[0]], [ids[1]], [stop])
    return found


ASKED = "<|im_start|>assistant\n"
OPEN = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "reasoning", "tokens"),
    [
        (ASKED, "<think>\nOh\n</think>\n\nYes.<|im_end|>", "Yes.", "Oh", "<think>\nOh\n</think>"),
        (ASKED, "\n<think>\n\n</think>\n\nYes.", "Yes.", "", "\n<think>\n\n</think>"),
        (ASKED, "Yes, <think>no</think>", "Yes, <think>no</think>", None, None),
        (ASKED, "Yes.", "Yes.", None, None),
        (ASKED, "<think>\nI was cut", "", "I was cut", "<think>\nI was cut"),
        (OPEN, "I see\n</think>\n\nYes.<|im_end|>", "Yes.", "I see", "I see\n</think>"),
        (OPEN, "I was cut", "", "I was cut", "I was cut"),
        (OPEN, "<think>\nAgain</think>Yes.", "Yes.", "Again", "<think>\nAgain</think>"),
        (f"{OPEN}\n</think>\n\n", "Yes.", "Yes.", None, None),
        (ASKED, "no opening</think>Yes.", "Yes.", "no opening", "no opening</think>"),
        ("say <think> to me", "Yes.", "Yes.", None, None),
        (OPEN, "", "", "", ""),
    ],
)  # fmt: skip
def test_reasoning_is_split_from_an_answer(
    tokenizer: Any,
    tags: ReasoningTags,
    prompt: str,
    answer: str,
    text: str,
    reasoning: str | None,
    tokens: str | None,
) -> None:
    found = parts(tokenizer, tags, prompt, answer)
    encode = tokenizer.backend_tokenizer.encode
    count = 0 if tokens is None else len(encode(tokens, add_special_tokens=False).ids)
    assert found == AnswerParts(text, reasoning, count)


def test_a_stop_string_cuts_the_answer_or_the_reasoning_where_it_stands(
    tokenizer: Any, tags: ReasoningTags
) -> None:
    said = "<think>a END b</think>c END"
    assert parts(tokenizer, tags, ASKED, said, "END")[:2] == ("c ", "a")
    assert parts(tokenizer, tags, ASKED, "<think>a END", "END")[:2] == ("", "a")


def test_without_tags_an_answer_is_all_text(tokenizer: Any) -> None:
    said = "<think>a</think>b"
    assert parts(tokenizer, None, ASKED, said) == AnswerParts(said, None, 0)


def test_channels_are_reasoning_and_answer(tokenizer: Any) -> None:
    template = "{{ '<|start|>assistant<|channel|>analysis<|message|>' }}"
    tags = find_tags(tokenizer, template)
    assert tags is not None
    prompt = "<|start|>assistant"
    thought = "<|channel|>analysis<|message|>I see<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>Yes.<|return|>"
    assert parts(tokenizer, tags, prompt, thought + final)[:2] == ("Yes.", "I see")
    assert parts(tokenizer, tags, prompt, final)[:2] == ("Yes.", None)
    assert parts(tokenizer, tags, prompt, "<|channel|>analysis<|message|>cut")[:2] == ("", "cut")


def test_tags_that_a_response_template_declares_come_first(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = {
        "fields": {"thinking": {"open": "<tool_call>", "close": "</tool_call>"}, "content": {}}
    }
    tags = find_tags(tokenizer, TEMPLATE)
    assert tags is not None and tags.names[:2] == ("<tool_call>", "</tool_call>")


def test_a_template_without_tags_has_none(tokenizer: Any) -> None:
    assert find_tags(tokenizer, "{{ messages }}") is None


@pytest.mark.parametrize(("begin", "end"), [("<thought>", "</think>"), ("<think>", "hello you")])
def test_a_tag_that_the_tokenizer_lacks_is_refused(tokenizer: Any, begin: str, end: str) -> None:
    missing = begin if begin != "<think>" else end
    with pytest.raises(UsageError, match=f"no token '{missing}'"):
        named_tags(tokenizer, begin, end)


def test_tags_are_found_for_chats_and_named_for_any_prompt(folder: Path) -> None:
    def find(value: str, are_messages: bool) -> ReasoningTags | None:
        settings = TokenSettings(reasoning_tags=value)
        return PromptTokenizer.load(str(folder), None, settings).find_reasoning(are_messages)

    assert find("auto", True) is not None
    assert find("auto", False) is None
    assert find("none", True) is None
    assert find("<think>,</think>", False) is not None


def test_a_prompt_that_ends_inside_of_reasoning_is_known(
    tokenizer: Any, tags: ReasoningTags
) -> None:
    encode = tokenizer.backend_tokenizer.encode
    opened: list[int] = encode(OPEN, add_special_tokens=False).ids
    assert tags.is_open(opened) and not tags.is_open(opened[:-2]) and not tags.is_open([])
    assert tags.begin_ids == (tokenizer.convert_tokens_to_ids("<think>"),)
    assert tags.end_ids == (tokenizer.convert_tokens_to_ids("</think>"),)


@pytest.mark.parametrize(
    ("behind", "is_open"),
    [
        ("<think>\n\n", True),
        ("<think>\nFirst I", False),  # text that names the tag, for all that one can know
        ("<think>\n\n</think>\n\n", False),  # a template that thinks for it
        ("</think> what is a <think>", True),
        ("<think> is a tag, is it?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_thinking_is_open_where_a_prompt_ends_with_its_tag(
    tokenizer: Any, tags: ReasoningTags, behind: str, is_open: bool
) -> None:
    encode = tokenizer.backend_tokenizer.encode
    ids: list[int] = encode("<|im_start|>user\n2 + 2? " + behind, add_special_tokens=False).ids
    assert tags.is_open(ids) is is_open
    assert tags.is_open(np.array(ids, np.uint32)) is is_open
