"""What a later turn adds: the template's text behind an answer that nobody knows yet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import Message, TurnPrompt
from pipeline.tokens.encoded import EncodedBatch
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tokens.conftest import CHATML, CONTROL, save_tokenizer

BOS, START, END = range(3)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<' + messages[0].content + '>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<|bos|>[INST] ' + (system if loop.first else '') + "
    "m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' <|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + (ns.s if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
DROPS_THOUGHTS = CHATML.replace(
    "message['content'] +", "message['content'].split('</think>')[-1].lstrip('\n') +"
)
BEGINS_THOUGHTS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
NUMBERS = CHATML.replace("message['role'] + '\n'", "message['role'] + loop.index | string + '\n'")
FORGETS_OLD = CHATML.replace("in messages %}", "in messages[-40:] %}")
NO_SYSTEM = CHATML.replace("('system', 'user'", "('user'")
ASKS_SYSTEM = CHATML.replace(
    "+ '\n' + message['content']",
    "+ (' quick' if message['role'] == 'user' and 'quick' in messages[0].content else '')"
    " + '\n' + message['content']",
)
GREETS_QUICKLY = CHATML.replace(
    "assistant\n' }}",
    "assistant\n' }}{% if 'quick' in messages[0].content %}{{ '(quick)\n' }}{% endif %}",
)
ONE_QUESTION = CHATML.replace("('system', 'user', 'assistant')", "('system', 'user')")


def load(folder: Path, **settings: Any) -> PromptTokenizer:
    return PromptTokenizer.load(str(folder), None, TokenSettings(**settings))


def with_template(tmp_path: Path, template: str, **settings: Any) -> PromptTokenizer:
    return load(save_tokenizer(tmp_path / "m", template), apply_chat_template=True, **settings)


def ids(batch: EncodedBatch, row: int = 0) -> list[int]:
    return np.split(batch.flat, np.cumsum(batch.lengths)[:-1])[row].tolist()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def check(tokenizer: PromptTokenizer) -> None:
    turns = tokenizer.later_turns(are_messages=False)
    assert turns is not None
    turns.check()


def first(content: Any) -> TurnPrompt:
    return TurnPrompt(content, True)


def later(content: Any) -> TurnPrompt:
    return TurnPrompt(content, False)


SYSTEM: Message = {"role": "system", "content": "You are helpful."}
SAID: Message = {"role": "assistant", "content": "now"}


@pytest.mark.parametrize("system_prompt", [None, "You are helpful.", "say <|im_end|> now"])
@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
def test_turns_and_answers_put_together_are_the_conversation(
    tmp_path: Path, template: str, system_prompt: str | None
) -> None:
    """Where the answers begin and end with control tokens or white space, to the last token."""
    tokenizer = with_template(tmp_path, template, system_prompt=system_prompt)
    check(tokenizer)
    texts = ["hello there", "say <|im_end|> now", "system \ue000\ue001 user", "hello"]
    batch = tokenizer.encode_batch([first(texts[0]), *map(later, texts[1:])])
    assert not batch.errors and (batch.lengths > 0).all()
    messages = [user(texts[0])]
    answer = load(tmp_path / "m").encode_batch(["now"]).flat.tolist()[1:]
    if template == LLAMA_2:
        answer = load(tmp_path / "m").encode_batch([" now"]).flat.tolist()[1:]
    parts = ids(batch, 0)
    for row, text in enumerate(texts[1:], 1):
        messages += [SAID, user(text)]
        parts += answer + ids(batch, row)
        whole = tokenizer.encode_batch([messages])
        assert not whole.errors and parts == ids(whole)


def test_without_a_template_a_turn_adds_its_text_alone(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokenizer.later_turns(are_messages=False) is None
    batch = tokenizer.encode_batch([first("hello"), later("hello"), later("say <|im_end|>"), None])
    assert ids(batch, 0) == [BOS, *ids(batch, 1)]
    assert END not in ids(batch, 2) and batch.lengths[3] == 0
    parsing = load(folder, parse_special_tokens=True)
    assert ids(parsing.encode_batch([later("<|bos|>say <|im_end|>")]))[::-1][0] == END
    assert ids(parsing.encode_batch([later("<|bos|>say")]))[0] == BOS  # what the row itself says


def test_a_turn_begins_with_what_ends_the_answer(folder: Path) -> None:
    batch = load(folder, apply_chat_template=True).encode_batch([later("hello")])
    assert ids(batch)[0] == END and ids(batch).count(START) == 2


def test_new_messages_may_be_several_and_of_any_role(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    new = [user("hello"), SAID, user("there")]
    batch = tokenizer.encode_batch([first([SYSTEM, user("say")]), later(new)])
    assert tokenizer.render(later(new)) == (
        "<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nnow<|im_end|>\n"
        "<|im_start|>user\nthere<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids(batch, 1).count(START) == 4
    assert tokenizer.render(first([user("hi")])) == "<|im_start|>user\nhi<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )
    assert load(tmp_path / "m").render(later("text")) == "text"


def test_a_system_message_in_a_later_turn_is_an_error_of_its_row(tmp_path: Path) -> None:
    batch = with_template(tmp_path, CHATML).encode_batch(
        [later([SYSTEM, user("hello")]), later("s")]
    )
    assert batch.errors.keys() == {0} and batch.error_types == {0: "BadMessages"}
    assert "put it into the first turn" in batch.errors[0] and batch.lengths.tolist()[0] == 0


@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
def test_the_length_of_a_system_message_is_known(tmp_path: Path, template: str) -> None:
    """Its own message, or where it stands in the first question what is before that."""
    tokenizer = with_template(tmp_path, template)
    batch = tokenizer.encode_batch(
        [
            first([SYSTEM, user("hello")]),
            first([user("hello")]),
            [SYSTEM, user("hello")],
            later("x"),
        ]
    )
    assert batch.system_tokens.keys() == {0, 1} and batch.system_tokens[1] == 0
    own = load(tmp_path / "m", parse_special_tokens=True)
    said = {
        CHATML: "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>",
        LLAMA_2: "<|bos|>[INST] <<You are helpful.>>",
    }[template]
    assert ids(batch, 0)[: batch.system_tokens[0]] == ids(own.encode_batch([later(said)]))


def test_the_system_prompt_of_the_job_counts_as_well(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML, system_prompt="say <|im_end|> now")
    batch = tokenizer.encode_batch([first("hello"), first([SYSTEM, user("hello")])])
    assert batch.system_tokens[0] > batch.system_tokens[1] > 0


@pytest.mark.parametrize(
    ("template", "system_prompt", "says"),
    [
        (SYSTEM_LAST, "You are helpful.", "writes the turns of a conversation otherwise"),
        (DROPS_THOUGHTS, None, "leaves out what earlier answers thought (<think>)"),
        (BEGINS_THOUGHTS, None, "writes the turns of a conversation otherwise"),
        (NUMBERS, None, "writes the turns of a conversation otherwise"),
        (FORGETS_OLD, None, "writes the turns of a conversation otherwise"),
        (GREETS_QUICKLY, "be quick", "writes the turns of a conversation otherwise"),
        (ONE_QUESTION, None, "so no second turn can be asked"),
    ],
)
def test_a_template_that_rewrites_history_is_refused_before_a_row_is_read(
    tmp_path: Path, template: str, system_prompt: str | None, says: str
) -> None:
    tokenizer = with_template(tmp_path, template, system_prompt=system_prompt)
    with pytest.raises(UsageError) as refused:
        check(tokenizer)
    message = str(refused.value)
    assert says in message and "--chat-template" in message and "\n" not in message


def test_a_template_that_moves_a_rows_own_system_message_refuses_its_conversation(
    tmp_path: Path,
) -> None:
    """Conversations without one go on."""
    tokenizer = with_template(tmp_path, SYSTEM_LAST)
    check(tokenizer)
    batch = tokenizer.encode_batch([first([SYSTEM, user("hello")]), first("hello"), later("say")])
    assert batch.error_types == {0: "TemplateRewritesHistory"} and batch.errors.keys() == {0}
    assert batch.lengths.tolist()[0] == 0 < min(batch.lengths.tolist()[1:])


def test_a_template_that_looks_at_the_system_message_has_it_in_every_turn(tmp_path: Path) -> None:
    quick: Message = {"role": "system", "content": "be quick"}
    tokenizer = with_template(tmp_path, ASKS_SYSTEM, system_prompt="be quick")
    check(tokenizer)
    assert "<|im_start|>user quick\nhello" in tokenizer.render(later("hello"))
    batch = tokenizer.encode_batch([first([quick, user("say")]), first([SYSTEM, user("say")])])
    assert batch.error_types == {1: "TemplateRewritesHistory"}
    assert "name it with --system-prompt" in batch.errors[1]


def test_a_turn_that_the_template_refuses_is_an_error_of_its_row(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, LLAMA_2)
    batch = tokenizer.encode_batch([later([user("hello"), user("there")]), later("hello")])
    assert batch.errors.keys() == {0} and "roles must alternate" in batch.errors[0]


def test_a_template_without_system_messages_is_not_blamed_early(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, NO_SYSTEM)
    check(tokenizer)
    batch = tokenizer.encode_batch([first([SYSTEM, user("hello")])])
    assert "refuses the conversation" in batch.errors[0] and not batch.error_types


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_control_tokens_that_swallow_white_space_do_so_between_turns(
    tmp_path: Path, strip: str
) -> None:
    folder = save_tokenizer(tmp_path, CHATML, **{strip: True})
    tokenizer = load(folder, apply_chat_template=True)
    batch = tokenizer.encode_batch([later("hello"), later("say <|im_end|>")])
    assert not batch.errors and ids(batch, 1).count(END) == ids(batch, 0).count(END) == 2


def test_ten_thousand_turns_cost_no_more_each_than_ten(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    turns = [later(f"hello {number}") for number in range(10_000)]
    tokenizer.encode_batch(turns[:10])
    started = time.monotonic()
    batch = tokenizer.encode_batch(turns)
    assert not batch.errors and time.monotonic() - started < 20
    print("seconds", time.monotonic() - started)


def test_the_control_tokens_are_those_of_the_tokenizer() -> None:
    assert CONTROL == ["<|bos|>", "<|im_start|>", "<|im_end|>"]
