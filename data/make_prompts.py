"""Writes the demo prompts: prompts.parquet and prompts_messages.parquet.

    python data/make_prompts.py

Three levels of sharing: the header of a task, the topic (tables, a customer, a town), and the item
(a ticket, an order, the news) that several questions ask about. Beside them singletons, which
share nothing from their first word on, and exact duplicates. Rows are shuffled, as they would come
from many users, so that the given order has poor locality. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import MAX_FACTS, TASKS, Question, Task, draw_topic
from layout import TASK_HEADERS, chat_messages, draw_header, plain_prompt
from words import MONTHS, VALUE_LISTS

MAX_NEW_TOKENS = 12
MIN_FACTS = 8
NUM_SINGLETONS = 60
NUM_DUPLICATES = 80


@dataclass(frozen=True)
class Sharing:
    """How many topics a task has, items a topic, and questions an item at most."""

    topics: int
    items: int
    questions: int


PLAIN: dict[Task, Sharing] = {
    "classify": Sharing(topics=10, items=24, questions=3),
    "extract": Sharing(topics=24, items=8, questions=4),
    "answer": Sharing(topics=24, items=5, questions=6),
}
CHAT: dict[Task, Sharing] = {
    "classify": Sharing(topics=4, items=10, questions=3),
    "extract": Sharing(topics=6, items=5, questions=4),
    "answer": Sharing(topics=5, items=4, questions=6),
}

Row = dict[str, object]

PLAIN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("customer_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("max_new_tokens", pa.int32()),
    ]
)
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CHAT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("customer_id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("answer", pa.string()),
        ("max_new_tokens", pa.int32()),
    ]
)


def draw_row(task: Task, question: Question, rng: random.Random) -> Row:
    """Return a row but for its id and its prompt; the customer is a column that users carry."""
    return {
        "task": task,
        "customer_id": f"C{rng.randrange(10**5):05d}",
        "answer": question.answer,
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def draw_rows(task: Task, sharing: Sharing, rng: random.Random, chat: bool) -> list[Row]:
    """Return the rows of a task, which share its headers, topics and items."""
    rows = []
    for i in range(sharing.topics):
        header = draw_header(task, rng)
        topic = draw_topic(task, rng, MIN_FACTS + i % (MAX_FACTS - MIN_FACTS + 1), "known")
        for _ in range(sharing.items):
            item = topic.draw_item(rng)
            num_questions = min(sharing.questions, len(item.questions))
            for question in rng.sample(item.questions, num_questions):
                if chat:
                    prompt: Row = {"messages": chat_messages(header, topic, item, question)}
                else:
                    prompt = {"prompt": plain_prompt(header, topic, item, question)}
                rows.append(draw_row(task, question, rng) | prompt)
    return rows


def draw_singletons(rng: random.Random) -> list[Row]:
    """Return letters: prompts with a sender instead of a header, each beginning differently."""
    rows = []
    senders = rng.sample(VALUE_LISTS["city"] + VALUE_LISTS["last"], NUM_SINGLETONS)
    for i, sender in enumerate(senders):
        task = TASKS[i % len(TASKS)]
        topic = draw_topic(task, rng, rng.randint(MIN_FACTS, MAX_FACTS), "known")
        item = topic.draw_item(rng)
        question = rng.choice(item.questions)
        opening = f"{sender}, {rng.choice(MONTHS)}. {rng.choice(TASK_HEADERS[task])}"
        prompt = plain_prompt(opening, topic, item, question)
        rows.append(draw_row(task, question, rng) | {"prompt": prompt})
    return rows


def number_rows(rows: list[Row], letter: str, rng: random.Random) -> list[Row]:
    """Return the rows in random order, with ids in the new order."""
    shuffled = rng.sample(rows, len(rows))
    return [{"id": f"{letter}{i:05d}"} | row for i, row in enumerate(shuffled)]


def make_plain(seed: int) -> pa.Table:
    """Return the plain prompts."""
    rng = random.Random(f"prompts-{seed}")
    rows = [row for task in TASKS for row in draw_rows(task, PLAIN[task], rng, chat=False)]
    rows += [dict(row) for row in rng.sample(rows, NUM_DUPLICATES)]
    rows += draw_singletons(rng)
    return pa.Table.from_pylist(number_rows(rows, "p", rng), PLAIN_SCHEMA)


def make_messages(seed: int) -> pa.Table:
    """Return the chat variant."""
    rng = random.Random(f"messages-{seed}")
    rows = [row for task in TASKS for row in draw_rows(task, CHAT[task], rng, chat=True)]
    return pa.Table.from_pylist(number_rows(rows, "m", rng), CHAT_SCHEMA)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder of the Parquet files"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pq.write_table(make_plain(args.seed), args.out / "prompts.parquet", compression="zstd")
    pq.write_table(
        make_messages(args.seed), args.out / "prompts_messages.parquet", compression="zstd"
    )


if __name__ == "__main__":
    main()
