"""What the rows of a table are scored for: choices, one continuation, questions, or the prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.inputs.bad_cell import BadCell, check_unicode
from pipeline.questions import Questionnaire
from pipeline.storage.plain_types import python_cells


@dataclass(frozen=True, slots=True)
class Choices:
    """Where the continuations of a row are: the column of lists `choices`, that of texts
    `continuation`, or the same `fixed` ones for every row; in none of them: its prompt is scored.

    `sheet`: questions are asked about its prompt instead, and their labels are scored; these ask
    for the columns `asked`.
    """

    choices: str | None = None
    continuation: str | None = None
    fixed: tuple[str, ...] = ()
    sheet: Questionnaire | None = None
    asked: tuple[str, ...] = ()

    @property
    def column(self) -> str | None:
        return self.choices or self.continuation

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it needs."""
        return self.asked if self.column is None else (self.column,)

    @property
    def are_prompts(self) -> bool:
        """Whether prompts are scored themselves."""
        return self.column is None and not self.fixed and self.sheet is None

    def cells(self, table: pa.Table) -> list[Any]:
        """Of each row, what `read` takes."""
        if self.column is None:
            return [self.fixed] * table.num_rows
        cells: list[Any] = python_cells(table.column(self.column))
        return cells

    def read(self, cell: object) -> tuple[str, ...]:
        """The continuations of a row, as they are written. Raises BadCell."""
        if self.column is None:
            return self.fixed
        if cell is None:
            raise BadCell(f"the column {self.column!r} is null")
        if self.continuation is not None:
            return _read_texts([cell], "the continuation")
        texts = _read_list(cell) if isinstance(cell, str) else cell
        if not isinstance(texts, list):
            raise BadCell("choices is not a list of texts")
        if not texts:
            raise BadCell("choices holds no choice")
        return _read_texts(texts, "choice {}")


def _read_list(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCell("choices is a text and no list in JSON") from None
    return value


def _read_texts(texts: list[Any], name: str) -> tuple[str, ...]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            kind = "null" if text is None else f"of type {type(text).__name__}, not text"
            raise BadCell(f"{name.format(number)} is {kind}")
        if not text:
            raise BadCell(f"{name.format(number)} is empty")
    check_unicode(*texts)
    return tuple(texts)
