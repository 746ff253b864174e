"""Draws the made-up tickets, records and passages, with questions whose answers are known.

A topic is what several items share (routing tables, a customer, a passage about a town); an item
is a ticket, an order or a news paragraph under it. Knows nothing about prompts, tokens or models.

One habit makes the corpus learnable for a model of a few million parameters: in a context a value
stands straight after its key ("- broken Returns", "The harbour exports copper"), and a question
ends with the key, so that looking a value up is finding the key again and copying what follows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from phrases import (
    CUSTOMER_FIELDS,
    FACT_TAILS,
    NOTES,
    ORDER_FIELDS,
    RELATIONS,
    TABLES,
    TICKET_TAILS,
    TICKETS,
    TOWN_FILLERS,
)
from words import MONTHS, VALUE_LISTS, split_pool

Task = Literal["classify", "extract", "answer"]
Side = Literal["known", "unseen", "all"]  # which words may be values, see words.py

TASKS: tuple[Task, ...] = ("classify", "extract", "answer")
PAIRS = [str(n) for n in range(10, 100)]
DAYS = [str(n) for n in range(10, 29)]
MAX_FACTS = 14  # of a context: table rows of one kind, fields of a record, facts of a passage


@dataclass(frozen=True)
class Question:
    """A question and its answer; `ask` may be empty, `stub` ends with the key of the value."""

    ask: str
    stub: str
    answer: str


@dataclass(frozen=True)
class Item:
    """The part of a prompt below the topic, and every question that topic and item answer."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Topic:
    """The part of a prompt which several items share; `draw_item` adds one item to it."""

    task: Task
    text: str
    draw_item: Callable[[random.Random], Item]
    lookups: tuple[Question, ...] = ()  # of single table rows: an easier exercise for training


class Draw:
    """Draws the values of one context; no word and no pair of digits is drawn twice.

    Copying a value of several tokens would be ambiguous if two values began alike.
    """

    def __init__(self, rng: random.Random, side: Side, used: frozenset[str] = frozenset()) -> None:
        self.rng = rng
        self.side = side
        self.used = set(used)

    def fork(self, rng: random.Random) -> Draw:
        """Return a draw for an item: it avoids what its topic used, and leaves the topic alone."""
        return Draw(rng, self.side, frozenset(self.used))

    def pool(self, kind: str) -> list[str]:
        """Return the words of a kind on this side of the split."""
        words = VALUE_LISTS[kind]
        return words if self.side == "all" else split_pool(words, self.side == "unseen")

    def unused(self, candidates: Sequence[str]) -> str:
        """Return a candidate that this context has not used yet."""
        chosen = self.rng.choice([word for word in candidates if word not in self.used])
        self.used.add(chosen)
        return chosen

    def digits(self, num_pairs: int) -> str:
        """Return a number of `num_pairs` pairs of digits, each pair new, the first not 0x."""
        pairs = [self.unused([str(n) for n in range(10, 100)]) for _ in range(num_pairs)]
        return "".join(pairs)

    def value(self, kind: str) -> str:
        """Return a value of a kind: a word of its list, a name, a date or a number."""
        if kind == "name":
            return f"{self.value('first')} {self.value('last')}"
        if kind == "date":
            return f"{self.unused(DAYS)} {self.unused(MONTHS)}"
        if kind in ("pair", "number", "code"):
            return self.digits({"pair": 1, "number": 2, "code": 3}[kind])
        return self.unused(self.pool(kind))


# --- classify: routing tables, then a ticket ------------------------------------------------


def draw_tables(draw: Draw, num_rows: int) -> dict[str, dict[str, str]]:
    """Return {question: {key: value}}: the problem table has `num_rows` rows, the others half."""
    tables: dict[str, dict[str, str]] = {}
    for kind, _, keys in TABLES:
        rows = num_rows if kind == "team" else max(2, num_rows // 2)
        chosen_keys = draw.rng.sample(keys, min(rows, len(keys)))
        pool = draw.pool(kind)
        values = draw.rng.sample(pool, min(len(pool), len(chosen_keys)))
        # As in real tables, two keys may share a value; a table of one value would ask nothing.
        tables[kind] = {key: values[i % len(values)] for i, key in enumerate(chosen_keys)}
    return tables


def draw_ticket(draw: Draw, tables: dict[str, dict[str, str]]) -> Item:
    """Return a ticket which names one key of each table, asked for the value of each."""
    rng = draw.rng
    keys = {kind: rng.choice(list(table)) for kind, table in tables.items()}
    text = rng.choice(TICKETS).format(
        name=draw.value("name"),
        first=draw.value("first"),
        product=draw.value("product"),
        code=draw.value("code"),
        date=draw.value("date"),
        month=rng.choice(MONTHS),
        problem=keys["team"],
        plan=keys["priority"],
        region=keys["channel"],
        tail=rng.choice(TICKET_TAILS),
    )
    questions = tuple(Question("", kind, tables[kind][keys[kind]]) for kind in tables)
    return Item(f"Ticket {draw.value('number')}\n{text}", questions)


def draw_classify(draw: Draw, num_facts: int) -> Topic:
    """Return routing tables under which tickets are drawn."""
    tables = draw_tables(draw, num_facts)
    blocks = []
    for kind, heading, _ in TABLES:
        blocks.append("\n".join([heading, *(f"- {k} {v}" for k, v in tables[kind].items())]))
    rows = [row for table in tables.values() for row in table.items()]
    lookups = tuple(Question("", key, value) for key, value in rows)
    text = "\n".join(blocks)
    return Topic("classify", text, lambda rng: draw_ticket(draw.fork(rng), tables), lookups)


# --- extract: a customer, then one of the customer's orders ----------------------------------


def draw_note(draw: Draw) -> str:
    """Return one or two remarks, which no question is about."""
    return "Note: " + " ".join(draw.rng.sample(NOTES, draw.rng.randint(1, 2)))


def draw_fields(draw: Draw, kinds: dict[str, str], num_fields: int) -> tuple[str, list[Question]]:
    """Return the lines of a record with `num_fields` fields in random order, and the questions."""
    names = draw.rng.sample(list(kinds), min(num_fields, len(kinds)))
    values = {name: draw.value(kinds[name]) for name in names}
    text = "\n".join(f"- {name} {value}" for name, value in values.items())
    return text, [Question("", name, value) for name, value in values.items()]


def draw_extract(draw: Draw, num_facts: int) -> Topic:
    """Return a customer record under which orders are drawn; half the fields are the customer's."""
    text, questions = draw_fields(draw, CUSTOMER_FIELDS, num_facts // 2)

    def draw_order(rng: random.Random) -> Item:
        fork = draw.fork(rng)
        number = fork.value("number")
        order, asked = draw_fields(fork, ORDER_FIELDS, num_facts - num_facts // 2)
        return Item(f"Order {number}\n{order}\n{draw_note(fork)}", (*questions, *asked))

    shared = f"Customer {draw.value('number')}\n{text}\n{draw_note(draw)}"
    return Topic("extract", shared, draw_order)


# --- answer: a passage about a town, then its latest news ------------------------------------


def draw_facts(draw: Draw, relations: Sequence[tuple[str, str, str]]) -> tuple[str, list[Question]]:
    """Return sentences that state the relations, with a filler between some, and the questions."""
    sentences, questions = [], []
    for ask, stub, kind in relations:
        value = draw.value(kind)
        sentences.append(f"{stub} {value}{draw.rng.choice(FACT_TAILS)}")
        questions.append(Question(ask, stub, value))
        if draw.rng.random() < 0.25:
            sentences.append(draw.rng.choice(TOWN_FILLERS))
    return " ".join(sentences), questions


def draw_answer(draw: Draw, num_facts: int) -> Topic:
    """Return a passage with two thirds of the facts; news with the others are drawn under it."""
    num_shared = (2 * num_facts + 2) // 3
    relations = draw.rng.sample(RELATIONS, len(RELATIONS))
    town = draw.value("city")
    text, questions = draw_facts(draw, relations[:num_shared])

    def draw_news(rng: random.Random) -> Item:
        fork = draw.fork(rng)
        date = fork.value("date")
        chosen = rng.sample(relations[num_shared:], num_facts - num_shared)
        news, asked = draw_facts(fork, chosen)
        return Item(f"News of {date}\n{news}", (*questions, *asked))

    return Topic("answer", f"About {town}\n{text}", draw_news)


DRAW_TOPIC: dict[Task, Callable[[Draw, int], Topic]] = {
    "classify": draw_classify,
    "extract": draw_extract,
    "answer": draw_answer,
}


def draw_topic(task: Task, rng: random.Random, num_facts: int, side: Side) -> Topic:
    """Return a random topic of a task, with values from one side of the split."""
    return DRAW_TOPIC[task](Draw(rng, side), num_facts)
