"""Rows whose documents need each other, or do not: what the study asks and its model learns.

```
start  the and |  k7 v3 ; of k9 v1 ; k4 v8 ; |  k2 k9 ; k4 v5 ; by k8 v6 ; ...  ? k2  v1 ;
preamble       |  document: three facts and filler                              question, answer
```

A fact says that a key means a value, or another key. The bindings are drawn anew for every context,
so nothing but the context can answer. What a key is asked for:

| task | | what an answer needs |
|---|---|---|
| local | one fact gives the value | one document |
| order | two or three documents give a value, the latest holds | which document is later |
| bridge-2, -3 | a chain over so many documents, each key defined before its use | those before |
| bridge-r | a chain over two documents, the key defined after its use | hops of the question |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Task = Literal["local", "order", "bridge-2", "bridge-3", "bridge-r"]
TASKS: tuple[Task, ...] = get_args(Task)

WORDS = ["<end>", "<start>", "|", ";", "?", "<unknown>"]
END, START, DOCUMENT, STOP, ASK, UNKNOWN = range(6)
FILLERS = range(6, 32)
VALUES = range(32, 96)
KEYS = range(96, 288)
VOCABULARY = 288
FACTS = 3
"""Of a document."""
DEEPEST = 3
"""Documents of the longest chain."""
MOST_DOCUMENTS = 6


class Fact(NamedTuple):
    """`right` is a value or a key. `reached`: the value at the end of the chain, None where the
    documents up to this one do not say it."""

    left: int
    right: int
    reached: int | None


@dataclass
class Key:
    """Of a key: its value now, the length of the chain to it, in how many documents it stands."""

    value: int
    depth: int
    document: int
    times: int = 1
    is_used: bool = False
    is_late: bool = False

    @property
    def task(self) -> Task | None:
        """As what it may be asked for."""
        if self.is_late:
            return "bridge-r" if self.depth == 2 else None
        if self.times > 1:
            return "order"
        kinds: dict[int, Task] = {1: "local", 2: "bridge-2", 3: "bridge-3"}
        return kinds[self.depth]


@dataclass
class Context:
    """Documents under construction. `pending`: keys that were used and are to be defined later,
    with the keys that mean them."""

    documents: list[list[Fact]] = field(default_factory=list)
    keys: dict[int, Key] = field(default_factory=dict)
    pending: list[tuple[int, int]] = field(default_factory=list)

    def of_task(self, task: Task) -> list[int]:
        return [key for key, known in self.keys.items() if known.task == task]


class Row(NamedTuple):
    """Token ids of one row; the answer is one value and `STOP`."""

    preamble: list[int]
    documents: list[list[int]]
    question: list[int]
    answer: list[int]


class Exam(NamedTuple):
    """Documents and several questions with their answers; `learned`: which of the ids after the
    first `ASK` and its key are answers."""

    preamble: list[int]
    documents: list[list[int]]
    question: list[int]
    answer: list[int]
    learned: list[bool]


class Taught(NamedTuple):
    """Token ids of a sequence, and which of them are learned."""

    token_ids: list[int]
    learned: list[bool]


def draw_context(rng: random.Random, documents: int) -> Context:
    """Facts of so many documents, in their order."""
    context = Context()
    names = rng.sample(KEYS, FACTS * documents + 2 * documents)
    for number in range(documents):
        facts: list[Fact] = []
        for place in range(FACTS):
            left = FACTS * (documents - number) - place  # facts that are still to be drawn
            facts.append(_draw_fact(context, rng, names, number, left))
        rng.shuffle(facts)
        context.documents.append(facts)
    return context


def _draw_fact(
    context: Context, rng: random.Random, names: list[int], number: int, left: int
) -> Fact:
    """The next fact of document `number`; `left` facts can still be drawn, this one included."""
    keys = context.keys
    due = [pair for pair in context.pending if keys[pair[1]].document < number]
    if due and (left <= len(context.pending) or rng.random() < 0.4):
        context.pending.remove(due[0])
        return _define_late(context, rng, *due[0], number)
    kind = rng.random()
    earlier = [k for k, known in keys.items() if known.document < number and not known.is_late]
    if kind < 0.45:
        targets = [k for k in earlier if keys[k].depth < DEEPEST and keys[k].times == 1]
        deep = [k for k in targets if keys[k].depth == DEEPEST - 1]
        if targets:
            target = rng.choice(deep if deep and rng.random() < 0.6 else targets)
            keys[target].is_used = True
            name, value = names.pop(), keys[target].value
            keys[name] = Key(value, keys[target].depth + 1, number)
            return Fact(name, target, value)
    elif kind < 0.65:
        targets = [k for k in earlier if keys[k].depth == 1 and not keys[k].is_used]
        targets = [k for k in targets if keys[k].times < 3]
        if targets:
            name, value = rng.choice(targets), rng.choice(VALUES)
            keys[name] = Key(value, 1, number, keys[name].times + 1)
            return Fact(name, value, value)
    elif kind < 0.77 and left - FACTS > len(context.pending):
        name, target = names.pop(), names.pop()
        keys[name] = Key(-1, 2, number, is_late=True)
        context.pending.append((target, name))
        return Fact(name, target, None)
    name, value = names.pop(), rng.choice(VALUES)
    keys[name] = Key(value, 1, number)
    return Fact(name, value, value)


def _define_late(context: Context, rng: random.Random, target: int, user: int, number: int) -> Fact:
    value = rng.choice(VALUES)
    context.keys[user].value = value
    context.keys[target] = Key(value, 1, number, is_used=True, is_late=True)
    return Fact(target, value, value)


def write_document(facts: Sequence[Fact], rng: random.Random, filler: int) -> list[int]:
    """Token ids of a document with `filler` words between its facts."""
    gaps = [rng.randrange(len(facts) + 1) for _ in range(filler)]
    ids = [DOCUMENT]
    for place, fact in enumerate(facts):
        ids += rng.choices(FILLERS, k=gaps.count(place))
        ids += [fact.left, fact.right, STOP]
    return ids + rng.choices(FILLERS, k=gaps.count(len(facts)))


def draw_row(task: Task, rng: random.Random, documents: int, filler: int = 4) -> Row:
    """A row that asks for a key of this task."""
    while True:
        context = draw_context(rng, documents)
        if asked := context.of_task(task):
            break
    key = rng.choice(asked)
    return Row(
        [START, *rng.choices(FILLERS, k=3)],
        [write_document(facts, rng, filler) for facts in context.documents],
        [ASK, key],
        [context.keys[key].value, STOP],
    )


def draw_library(rng: random.Random, documents: int) -> list[list[Fact]]:
    """Facts of documents that many rows can have, in any order: each key stands in one."""
    keys = iter(rng.sample(KEYS, FACTS * documents))
    values = [[rng.choice(VALUES) for _ in range(FACTS)] for _ in range(documents)]
    return [[Fact(next(keys), value, value) for value in some] for some in values]


def vocabulary() -> list[str]:
    """The word of each token id."""
    words = [*WORDS, *(f"w{i}" for i in range(len(FILLERS)))]
    return words + [f"v{i}" for i in range(len(VALUES))] + [f"k{i}" for i in range(len(KEYS))]


def draw_exam(
    rng: random.Random, documents: int, tasks: Sequence[Task] = TASKS, questions: int = 8
) -> Exam:
    """As `draw_row`, with several questions of these tasks."""
    while True:
        context = draw_context(rng, documents)
        if any(context.of_task(task) for task in tasks):
            break
    ids, learned = _ask(context, rng, tasks, questions)
    preamble = [START, *rng.choices(FILLERS, k=3)]
    shown = [write_document(facts, rng, 4) for facts in context.documents]
    return Exam(preamble, shown, ids[:2], ids[2:], learned[2:])


def draw_sequence(rng: random.Random, documents: int, is_taught: bool) -> Taught:
    """Documents and questions with their answers. Where `is_taught`, a mention of a key is followed
    by the value that it leads to, and that is learned: documents must look it up while they are
    read."""
    context = draw_context(rng, documents)
    ids = [START, *rng.choices(FILLERS, k=rng.randrange(7))]
    learned = [False] * len(ids)
    for facts in context.documents:
        shown = write_document(facts, rng, rng.randrange(7))
        reached = {fact.left: fact.reached for fact in facts if fact.right in KEYS}
        for place, token in enumerate(shown):
            ids.append(token)
            learned.append(False)
            value = reached.get(shown[place - 1]) if place and token in KEYS else None
            if is_taught and value is not None:
                ids.append(value)
                learned.append(True)
    asked, are_answers = _ask(context, rng, TASKS, 8)
    return Taught(ids + asked, learned + are_answers)


def _ask(
    context: Context, rng: random.Random, tasks: Sequence[Task], questions: int
) -> tuple[list[int], list[bool]]:
    """Ids of questions with answers, and which of them are answers."""
    kinds = [task for task in tasks if context.of_task(task)]
    ids: list[int] = []
    for _ in range(questions):
        key = rng.choice(context.of_task(rng.choice(kinds)))
        ids += [ASK, key, context.keys[key].value, STOP]
    return ids, [False, False, True, True] * questions
