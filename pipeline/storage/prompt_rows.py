"""Rows of a table become prompts, or a reason why not, each by itself. Knows no files.

Whatever is wrong with a row, the rows beside it are read as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.records import Message, PromptBatch, Rejected
from pipeline.storage.cells import BadCell, read_fields, read_messages, read_sampling, read_text
from pipeline.storage.columns import ColumnMap
from pipeline.storage.plain_types import python_rows, text_of
from pipeline.storage.prompt_template import PromptTemplate

Content = str | list[Message]
Value = TypeVar("Value")


class _Fault(Exception):
    """Why a row cannot run: the type of its error, and a sentence."""


@dataclass(frozen=True)
class RowReader:
    """Makes prompts of the rows of plain tables with the columns `columns.names`."""

    columns: ColumnMap
    template: PromptTemplate | None = None

    def read(
        self,
        table: pa.Table,
        row_start: int,
        make_ids: Callable[[], list[str]],
        orders: Sequence[Sequence[int]] | None = None,
    ) -> PromptBatch:
        """The prompts of `table`, whose first row is the job's row `row_start`.

        `make_ids`: an id for each row, for those without one. `orders`: of each row, what
        `PromptTemplate.render` takes.

        Raises UsageError where the template takes too long on row after row.
        """
        columns = self.columns
        ids, faults = _read_ids(table, columns.id, make_ids)
        contents: list[Content | None] = []
        overrides: list[dict[str, object]] = []
        cells = self._content_cells(table, orders)
        for row, (content, refused, sampling, fields) in enumerate(
            zip(
                cells,
                _cells(table, columns.refused),
                _python_cells(table, columns.sampling_params),
                _rows(table, columns.fields),
                strict=True,
            )
        ):
            parsed, override = None, {}
            try:
                if refused is not None:
                    raise _Fault("BadRequest", refused)
                if row not in faults:
                    parsed = self._content(content)
                    override = _overrides(sampling, fields)
            except _Fault as fault:
                parsed = None
                faults[row] = fault
            contents.append(parsed)
            overrides.append(override)
        rejected = tuple(Rejected(row_start + row, *fault.args) for row, fault in faults.items())
        return PromptBatch(
            row_start, ids, contents, overrides, _cells(table, columns.tenant), rejected
        )

    def _content_cells(
        self, table: pa.Table, orders: Sequence[Sequence[int]] | None
    ) -> Sequence[Any]:
        """What each row's prompt is made of: a cell, or what `PromptTemplate.render` takes."""
        if self.template is None:
            if self.columns.prompt is not None:
                return _cells(table, self.columns.prompt)
            return _python_cells(table, self.columns.messages)
        rows = _rows(table, self.template.columns)
        return list(zip(rows, orders or repeat(None, len(rows)), strict=True))

    def _content(self, cell: Any) -> Content:
        """Raises _Fault."""
        if self.template is not None:
            row, order = cell
            template = self.template
            return _attempt("TemplateError", lambda: read_text(template.render(row, order)), row)
        if cell is None:
            raise _Fault("NullPrompt", "the prompt is null")
        if self.columns.messages is not None:
            return _attempt("BadMessages", lambda: read_messages(cell), cell)
        return _attempt("EmptyPrompt", lambda: read_text(cell), cell)


class _Unreadable:
    """A cell whose value Python's own types cannot hold."""


_UNREADABLE = _Unreadable()
_BEYOND = (
    "a value of the row is beyond what can be read: a time after the year 9999, or bytes that are "
    "not text in UTF-8"
)


def _attempt(error_type: str, read: Callable[[], Value], *cells: object) -> Value:
    """What `read` makes of the cells. Raises _Fault, whatever it raises but UsageError."""
    if any(cell is _UNREADABLE for cell in cells):
        raise _Fault(error_type, _BEYOND)
    try:
        return read()
    except BadCell as error:
        raise _Fault(error_type, str(error)) from None
    except UsageError:
        raise
    except Exception as error:  # what it is we cannot know; what it says may quote the row
        raise _Fault(error_type, f"the row cannot be read ({type(error).__name__})") from None


def _overrides(sampling: object, fields: Any) -> dict[str, object]:
    """Of the columns, and of `sampling_params` what they leave open. Raises _Fault."""
    if sampling is None and not fields:
        return {}

    def read() -> dict[str, object]:
        return ({} if sampling is None else read_sampling(sampling)) | read_fields(fields)

    return _attempt("BadSamplingParams", read, sampling, fields)


def _cells(table: pa.Table, name: str | None) -> list[Any]:
    """Of a column of text; nulls without a column."""
    if name is None:
        return [None] * table.num_rows
    cells: list[Any] = table.column(name).to_pylist()
    return cells


def _rows(table: pa.Table, names: Sequence[str]) -> list[Any]:
    """Of these columns a dict for each row, or _UNREADABLE."""
    if not names:
        return [{}] * table.num_rows
    rows = python_rows(table.select(list(names)))
    return [_UNREADABLE if row is None else row for row in rows]


def _python_cells(table: pa.Table, name: str | None) -> list[Any]:
    """Of a column of any type; nulls without a column."""
    if name is None:
        return [None] * table.num_rows
    return [row if row is _UNREADABLE else row[name] for row in _rows(table, [name])]


def _read_ids(
    table: pa.Table, name: str | None, make_ids: Callable[[], list[str]]
) -> tuple[list[str], dict[int, _Fault]]:
    """Of each row an id, and why a row's own cannot be used."""
    if name is None:
        return make_ids(), {}
    column = table.column(name)
    found = text_of(column)
    without = [row for row, text in enumerate(found) if text is None]
    if not without:
        return found, {}  # type: ignore[return-value]
    made, is_null = make_ids(), column.is_null().to_pylist()
    null = _Fault("NullId", f"the row has no id in the column {name!r}")
    bad = _Fault("BadId", f"the id of the row in the column {name!r} is not text")
    ids = [made[row] if text is None else text for row, text in enumerate(found)]
    return ids, {row: null if is_null[row] else bad for row in without}
