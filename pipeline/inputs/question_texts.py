"""What questions say to each row of a table, by the templates in them. Knows no files of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell, check_unicode
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.questions import Question, Questionnaire

_MOST_TEMPLATES = 32  # a process each
_MARKS = ("{{", "{%", "{#")


class QuestionTexts:
    """`columns`: those of the table that some question asks for, sorted."""

    def __init__(self, sheet: Questionnaire, known: Sequence[str]) -> None:
        """`known`: the table's columns. Raises UsageError with what is wrong in which question."""
        self.sheet = sheet
        templated = [question for question in sheet.questions if _is_template(question)]
        if len(templated) > _MOST_TEMPLATES:
            raise UsageError(
                f"{len(templated)} questions are templates, and at most {_MOST_TEMPLATES} may be; "
                "put what they print of a row into its own text"
            )
        self._templates: dict[str, PromptTemplate] = {}
        for question in templated:
            name = f"the question {question.name!r}"
            template = PromptTemplate(question.text, known, name, may_be_constant=True)
            if template.fields:
                raise UsageError(f"{name}: fields(...) lists columns in a --template alone")
            self._templates[question.name] = template
        named = {column for template in self._templates.values() for column in template.columns}
        self.columns = tuple(sorted(named))

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...] | BadCell]:
        """All questions as each row is asked them, or why there is one that it cannot be asked."""
        texts: list[list[str | BadCell]] = []
        for question in self.sheet.questions:
            template = self._templates.get(question.name)
            if template is None:
                texts.append([question.text] * len(rows))
            else:
                said = template.render_all([(row, None) for row in rows])
                texts.append([_of_question(question, text) for text in said])
        return [_joined(row) for row in zip(*texts, strict=True)]


def _is_template(question: Question) -> bool:
    return any(mark in question.text for mark in _MARKS)


def _of_question(question: Question, text: str | BadCell) -> str | BadCell:
    if isinstance(text, BadCell):
        return BadCell(f"the question {question.name!r}: {text}")
    if not text.strip():
        return BadCell(f"the question {question.name!r} is empty for this row")
    try:
        check_unicode(text)
    except BadCell as error:
        return BadCell(f"the question {question.name!r}: {error}")
    return text


def _joined(texts: Sequence[str | BadCell]) -> tuple[str, ...] | BadCell:
    fault = next((text for text in texts if isinstance(text, BadCell)), None)
    return fault if fault is not None else tuple(text for text in texts if isinstance(text, str))
