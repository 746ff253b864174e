"""Prompts of a planned job as the model will see them, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.job.planning import PlannedJob
from pipeline.job.reading import select_rows
from pipeline.prompts import AskedPrompt, Content, ScoredPrompt, SegmentedPrompt

_SHOWN_TURNS = 4
_SHOWN_CONTINUATIONS = 16


def show_first(planned: PlannedJob) -> dict[str, Any]:
    """`first`: the first prompt that can run, or None; `first_conversation`: what its turns add,
    where rows are turns."""
    runs = planned.plan.whole_rows
    if not len(runs):
        return {"first": None}
    first = planned.input_row(int(runs[0]))
    (content,) = _contents(planned, [first])
    if planned.ordered is not None and isinstance(content, SegmentedPrompt):
        order = planned.ordered.numbers()[first]
        documents = tuple(content.documents[number] for number in order)
        content = replace(content, documents=documents)
    found: dict[str, Any] = {
        "first": {
            "id": planned.ids[first],
            "rendered": planned.job.tokenizer.render(content),
            "token_ids": _first_ids(planned, first),
        }
    }
    if isinstance(content, ScoredPrompt | AskedPrompt):
        found["first"]["continuations"] = _continuations(planned, first, content)
    pieces = _later_turns(planned, first)
    return found if pieces is None else found | {"first_conversation": pieces}


def _first_ids(planned: PlannedJob, row: int) -> list[int]:
    """The prompt; of a row that is scored the context of its first continuation."""
    ids: list[int] = planned.plan.table[planned.first_in_table(row)].tolist()
    if planned.requests is None:
        return ids
    return ids[: int(planned.requests.contexts[planned.first_in_table(row)])]


def _continuations(
    planned: PlannedJob, row: int, content: ScoredPrompt | AskedPrompt
) -> list[dict[str, Any]]:
    """The token ids of each continuation, as the model will see them; of each question's labels,
    whose `question` is named."""
    requests = planned.requests
    assert requests is not None
    left, found = list(requests.of_row(row)), list[dict[str, Any]]()
    for name, texts in _named(content):
        own, left = left[: len(texts) or len(left)], left[len(texts) or len(left) :]
        for number, request in enumerate(own[:_SHOWN_CONTINUATIONS]):
            behind = planned.plan.table[request][int(requests.contexts[request]) :].tolist()
            text = texts[number] if texts else "(the prompt itself)"
            ids = [*behind, int(requests.last[request])]
            found.append({**name, "text": text, "token_ids": ids})
    return found


def _named(
    content: ScoredPrompt | AskedPrompt,
) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    if isinstance(content, ScoredPrompt):
        yield {}, content.continuations
    else:
        for question in content.sheet.questions[:_SHOWN_CONTINUATIONS]:
            yield {"question": question.name}, question.labels


def _later_turns(planned: PlannedJob, first: int) -> list[dict[str, Any]] | None:
    turns, numbers = planned.plan.conversations, planned.job.source.turns
    if turns is None or numbers is None:
        return None
    sequence = int(planned.plan.sequence_of_row[first])
    rows = turns.row[list(turns.turns(sequence))][1 : 1 + _SHOWN_TURNS].tolist()
    in_order = np.argsort(np.argsort(rows))
    contents = _contents(planned, rows)
    return [
        {
            "turn": int(numbers.turn[row]),
            "id": planned.ids[row],
            "added": planned.job.tokenizer.render(contents[place]),
            "token_ids": planned.plan.table[row].tolist(),
        }
        for row, place in zip(rows, in_order.tolist(), strict=True)
    ]


def _contents(planned: PlannedJob, rows: list[int]) -> list[Content]:
    """Of rows that can run, by row number."""
    contents = select_rows(planned.job, rows).contents
    return [content for content in contents if content is not None]
