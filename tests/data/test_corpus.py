"""The generator: seeded, true to its own answers, and honest about what it holds out."""

from __future__ import annotations

import random
import re

import pytest
from corpus import MAX_FACTS, TASKS, Task, draw_topic
from layout import chat_document, chat_messages, draw_header, plain_document, plain_prompt
from words import VALUE_LISTS, split_pool

from .oracle import solve_messages, solve_plain


def render(task: Task, seed: str, num_facts: int = MAX_FACTS) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    topic = draw_topic(task, rng, num_facts, "known")
    item = topic.draw_item(rng)
    header = draw_header(task, rng)
    return [(plain_prompt(header, topic, item, asked), asked.answer) for asked in item.questions]


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_text_and_another_seed_another(task: Task) -> None:
    assert render(task, "1") == render(task, "1")
    assert render(task, "1") != render(task, "2")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_facts", [2, 7, MAX_FACTS])
def test_answers_follow_from_the_prompt(task: Task, num_facts: int) -> None:
    for seed in range(40):
        for prompt, answer in render(task, str(seed), num_facts):
            assert solve_plain(task, prompt) == answer, prompt


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_messages(task: Task) -> None:
    rng = random.Random(3)
    for _ in range(40):
        topic = draw_topic(task, rng, MAX_FACTS, "known")
        item = topic.draw_item(rng)
        for asked in item.questions:
            messages = chat_messages(draw_header(task, rng), topic, item, asked)
            assert solve_messages(task, messages) == asked.answer


def test_the_header_decides_the_class() -> None:
    """One problem goes to different teams under different tables, so it must be looked up."""
    teams = {solve_plain("classify", prompt) for s in range(30) for prompt, _ in
             render("classify", str(s)) if prompt.endswith("team")}  # fmt: skip
    assert len(teams) > 10


@pytest.mark.parametrize("task", TASKS)
def test_no_task_shows_an_unseen_word(task: Task) -> None:
    rng = random.Random(4)
    seen: set[str] = set()
    for _ in range(200):
        topic = draw_topic(task, rng, MAX_FACTS, "known")
        seen.update(re.findall(r"\w+", topic.text + "\n" + topic.draw_item(rng).text))
    # A word may stand on both sides, in two lists: then it is seen.
    unseen = {word for words in VALUE_LISTS.values() for word in split_pool(words, True)}
    known = {word for words in VALUE_LISTS.values() for word in split_pool(words, False)}
    assert not seen & (unseen - known)
    assert len(unseen - known) > 100


@pytest.mark.parametrize("lay_out", [plain_document, chat_document])
def test_a_training_document_holds_every_answer_once(lay_out: object) -> None:
    assert callable(lay_out)
    rng = random.Random(5)
    topic = draw_topic("extract", rng, 8, "known")
    item = topic.draw_item(rng)
    segments = lay_out("", topic, [item], rng)
    answers = [segment.text for segment in segments if segment.is_answer]
    found = sorted(re.sub(r"<\|\w+\|>$", "", answer).removeprefix(" ") for answer in answers)
    assert found == sorted(asked.answer for asked in item.questions)
