"""Lays contexts and questions out as prompts, chat messages and training documents.

Knows where the pieces stand and which of them are answers; knows nothing about token ids.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from corpus import Item, Question, Task, Topic

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|pad|>"

COMMON_HEADER = (
    "You work for a trading company and fill in forms. Use only the text below, add nothing of "
    "your own, and copy each value exactly as it is written."
)
TASK_HEADERS: dict[Task, list[str]] = {
    "classify": [
        "Read the ticket, find its problem, account and branch, and look them up in the tables.",
        "Sort the support ticket with the tables that follow. The tables change from day to day, "
        "so do not rely on what was right before.",
    ],
    "extract": [
        "Read the customer record and the order, and give the value of one field.",
        "Here are a customer and one of the orders. Report the field that is asked for, without "
        "its name and without a full stop.",
    ],
    "answer": [
        "Read the passage about a town and its news, and complete the last sentence.",
        "A reader asks about a town. The answer stands in the passage or in the news; finish the "
        "sentence with a name, a thing or a number.",
    ],
}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Segment:
    """A piece of a training document; the model is trained to produce it if `is_answer`."""

    text: str
    is_answer: bool


def draw_header(task: Task, rng: random.Random) -> str:
    """Return the instructions above a topic: a line for every task, and one for this task."""
    return f"{COMMON_HEADER}\n{rng.choice(TASK_HEADERS[task])}"


def join(*parts: str) -> str:
    """Join the parts that are not empty, a line each."""
    return "\n".join(part for part in parts if part)


def ask_plain(question: Question) -> str:
    """Return the last lines of a plain prompt; the answer follows after a space."""
    return join(question.ask and f"Question: {question.ask}", f"Answer: {question.stub}")


def ask_in_chat(question: Question) -> str:
    """Return the last line of a user's message."""
    return f"Question: {question.ask} {question.stub}".replace("  ", " ")


def plain_prompt(header: str, topic: Topic, item: Item, question: Question) -> str:
    """Return a prompt which the model continues with a space and the answer."""
    return join(header, topic.text, item.text, ask_plain(question))


def chat_messages(header: str, topic: Topic, item: Item, question: Question) -> Messages:
    """Return the same work as a system message and a user's message."""
    return [
        {"role": "system", "content": join(header, topic.text)},
        {"role": "user", "content": join(item.text, ask_in_chat(question))},
    ]


def plain_document(
    header: str, topic: Topic, items: list[Item], rng: random.Random
) -> list[Segment]:
    """Return a training document: the context once, then its questions in random order."""
    segments = [Segment(join(header, topic.text), False)]
    for item in items:
        if item.text:
            segments.append(Segment(f"\n{item.text}", False))
        for question in rng.sample(item.questions, len(item.questions)):
            segments.append(Segment(f"\n{ask_plain(question)}", False))
            segments.append(Segment(f" {question.answer}{END_OF_TEXT}", True))
    return segments


def chat_document(
    header: str, topic: Topic, items: list[Item], rng: random.Random
) -> list[Segment]:
    """Return a training document in the chat format, a turn for each question."""
    segments = [Segment(f"{TURN_START}system\n{join(header, topic.text)}{TURN_END}\n", False)]
    for item in items:
        shown = item.text
        for question in rng.sample(item.questions, len(item.questions)):
            user = join(shown, ask_in_chat(question))
            turn = f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"
            segments.append(Segment(turn, False))
            segments.append(Segment(f" {question.answer}{TURN_END}", True))
            segments.append(Segment("\n", False))
            shown = ""
    return segments
