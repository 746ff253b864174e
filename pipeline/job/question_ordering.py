"""Whether questions stand before or behind the text of each row: by which of the two rows share
more. Keeps no text.

What is shared is counted in bytes of the texts as they are asked, as the tree would share them: a
row's text is computed once for all of its questions where it comes first, and a question once for
all rows where that does. Of large files as many texts are counted as fit, and each of them wherever
it comes, so that what is there often counts as often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.inputs.prompt_source import PromptSource
from pipeline.plan.distinct_bytes import count_distinct_bytes
from pipeline.prompts import AskedPrompt, PromptBatch
from pipeline.questions import Order, Question, Questionnaire, Text

_MOST_BYTES = 16 << 20
"""Of texts, each with all of its questions, that are counted."""


@dataclass(frozen=True)
class QuestionSaving:
    """Shares of the bytes of `rows` and their questions that are shared, by order: `first` or
    `last`. `order`: the one that is taken."""

    order: Order
    rows: int
    first: float
    last: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def order_questions(source: PromptSource) -> QuestionSaving:
    """By all rows of `source`, or some. Raises InputError on a damaged page."""
    some = _choose(source.iter_prompts())
    sheet = None if source.columns.scored is None else source.columns.scored.sheet
    assert sheet is not None
    first, last = (_share(some, sheet.ordered(order)) for order in ("first", "last"))
    return QuestionSaving("first" if first > last else "last", len(some), first, last)


class _Row(NamedTuple):
    """`mark`: the same for equal texts."""

    mark: int
    prompt: AskedPrompt
    tenant: str | None
    size: int


def _choose(batches: Iterable[PromptBatch]) -> list[_Row]:
    """All rows, or where these are too many those whose texts fall into every second, fourth, ...
    class of marks."""
    rows: list[_Row] = []
    total, classes = 0, 1
    for batch in batches:
        for prompt, tenant in zip(batch.contents, batch.tenants, strict=True):
            if not isinstance(prompt, AskedPrompt):
                continue
            text = _spelled(prompt.content)
            mark = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            if mark % classes:
                continue
            questions = sum(len(question) for question in prompt.questions)
            row = _Row(mark, prompt, tenant, len(prompt.questions) * len(text) + questions)
            rows.append(row)
            total += row.size
            while total > _MOST_BYTES and len(rows) > 1:
                classes *= 2
                rows = [row for row in rows if row.mark % classes == 0] or rows[:1]
                total = sum(row.size for row in rows)
    return rows


def _share(rows: list[_Row], sheet: Questionnaire) -> float:
    numbers = {tenant: number for number, tenant in enumerate({row.tenant: 0 for row in rows})}
    texts, owner = list[bytes](), list[int]()
    for row in rows:
        for question in row.prompt.questions:
            texts.append(_spelled(sheet.compose(row.prompt.content, question)))
            owner.append(numbers[row.tenant])
    total = sum(map(len, texts))
    if not total:
        return 0.0
    return 1.0 - count_distinct_bytes(texts, np.array(owner, np.int64)) / total


def _spelled(content: Text) -> bytes:
    if isinstance(content, str):
        return content.encode(errors="replace")
    return "\n".join(f"{m.get('role')}\n{m.get('content')}" for m in content).encode(
        errors="replace"
    )


def describe_order(order: str, saving: QuestionSaving | None) -> str:
    """A sentence for a person."""
    where = "before" if order == "first" else "behind"
    said = f"questions stand {where} the text of each row"
    if saving is None:
        return f"{said}, as asked by --question-order"
    return f"{said}: {saving.first:.1%} shared before it, {saving.last:.1%} behind it"


def question_figures(
    questions: Sequence[Question], order: str, saving: QuestionSaving | None
) -> dict[str, Any]:
    """What a plan says of questions; nothing where none are asked."""
    if not questions:
        return {}
    return {
        "questions": len(questions),
        "question_order": order,
        "question_order_saving": None if saving is None else saving.to_json(),
        "text": describe_order(order, saving),
    }
