"""Rows of the study: an answer follows from the documents, and from as many as the task says."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from pipeline.segments.tasks import (
    ASK,
    DOCUMENT,
    FILLERS,
    KEYS,
    STOP,
    TASKS,
    VALUES,
    Row,
    Task,
    draw_exam,
    draw_row,
    draw_sequence,
)

MANY = 150


def facts(document: Sequence[int]) -> list[tuple[int, int]]:
    """Of a document's ids alone; written apart from the generator, to check it."""
    assert document[0] == DOCUMENT
    words = [token for token in document[1:] if token not in FILLERS]
    assert len(words) == 9 and words[2::3] == [STOP] * 3
    return [(words[i], words[i + 1]) for i in range(0, 9, 3)]


def solve(documents: Sequence[Sequence[int]], key: int) -> int | None:
    """The value that a key leads to; of several facts the last holds. None: it leads nowhere."""
    meaning = dict(fact for document in documents for fact in facts(document))
    at: int | None = key
    while at is not None and at in KEYS:
        at = meaning.get(at)
    return at


def rows(task: Task) -> list[Row]:
    rng = random.Random(7)
    return [draw_row(task, rng, 3 + i % 4) for i in range(MANY)]


def documents_of_chain(row: Row) -> list[int]:
    """In which documents the facts stand that lead from the question to its answer."""
    places = []
    key = row.question[1]
    while key in KEYS:
        said = [(i, r) for i, d in enumerate(row.documents) for k, r in facts(d) if k == key]
        places.append(said[-1][0])
        key = said[-1][1]
    return places


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_follows_from_the_documents(task: Task) -> None:
    for row in rows(task):
        assert row.question[0] == ASK and row.answer[1] == STOP
        assert solve(row.documents, row.question[1]) == row.answer[0]
        assert row.answer[0] in VALUES


def test_local_needs_one_document_and_bridges_as_many_as_they_say() -> None:
    for row in rows("local"):
        assert len(documents_of_chain(row)) == 1
        said = [k for d in row.documents for k, _ in facts(d)]
        assert said.count(row.question[1]) == 1
    for task, documents in (("bridge-2", 2), ("bridge-3", 3)):
        for row in rows(task):  # type: ignore[arg-type]
            places = documents_of_chain(row)
            assert len(places) == documents and places == sorted(set(places), reverse=True)


def test_order_has_several_values_and_the_latest_holds() -> None:
    times = []
    for row in rows("order"):
        said = [r for d in row.documents for k, r in facts(d) if k == row.question[1]]
        times.append(len(said))
        assert said[-1] == row.answer[0]
    assert set(times) == {2, 3}


def test_bridge_r_defines_after_the_use() -> None:
    for row in rows("bridge-r"):
        use, definition = documents_of_chain(row)
        assert use < definition


def test_no_binding_lasts_from_row_to_row() -> None:
    values: dict[int, set[int]] = {}
    for row in rows("local"):
        values.setdefault(row.question[1], set()).add(row.answer[0])
    assert sum(len(some) > 1 for some in values.values()) > 5
    assert len({row.answer[0] for row in rows("local")}) > 40


def test_an_exam_asks_for_its_tasks_and_learns_answers_alone() -> None:
    rng = random.Random(8)
    for _ in range(MANY):
        exam = draw_exam(rng, 4, ("local",))
        ids = exam.question + exam.answer
        learned = [False, False, *exam.learned]
        assert len(ids) == 32 and sum(learned) == 16
        for at in range(0, 32, 4):
            assert ids[at] == ASK and ids[at + 2] == solve(exam.documents, ids[at + 1])
            assert learned[at : at + 4] == [False, False, True, True]


def test_a_taught_sequence_says_what_a_mention_leads_to() -> None:
    rng = random.Random(9)
    shown = 0
    for _ in range(MANY):
        ids, learned = draw_sequence(rng, 4, is_taught=True)
        end = ids.index(ASK)
        taught = [i for i in range(end) if learned[i]]
        documents, document = [], [DOCUMENT]
        for i in range(ids.index(DOCUMENT) + 1, end):
            if ids[i] == DOCUMENT:
                documents.append(document)
                document = []
            if i not in taught:
                document.append(ids[i])
        documents.append(document)
        for i in taught:
            assert ids[i - 1] in KEYS and solve(documents, ids[i - 1]) == ids[i]
            shown += 1
    assert shown > MANY


def test_the_same_seed_gives_the_same_rows() -> None:
    assert rows("bridge-3") == rows("bridge-3")
