"""Rows of a table become prompts, or a reason why not, each by itself. Knows no files.

Whatever is wrong with a row, the rows beside it are read as if it were not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import (
    read_documents,
    read_fields,
    read_messages,
    read_sampling,
    read_schema,
    read_segments,
    read_text,
    without_gaps,
)
from pipeline.inputs.chat_fields import GIVEN
from pipeline.inputs.choices import Choices
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.inputs.question_texts import QuestionTexts
from pipeline.prompts import (
    AskedPrompt,
    ChatPrompt,
    Content,
    PromptBatch,
    Rejected,
    ScoredPrompt,
    SegmentedPrompt,
)
from pipeline.storage.plain_types import UNREADABLE, python_cells, text_of

Value = TypeVar("Value")


class _Fault(Exception):
    """Why a row cannot run: the type of its error, and a sentence."""


_Faults = dict[int, _Fault]


@dataclass(frozen=True)
class RowReader:
    """Makes prompts of the rows of plain tables with the columns `columns.names`."""

    columns: ColumnMap
    template: PromptTemplate | None = None
    texts: QuestionTexts | None = None

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
        refused = enumerate(_cells(table, columns.refused))
        faults |= {row: _Fault("BadRequest", why) for row, why in refused if why is not None}
        contents = self._contents(table, orders, faults)
        if self.texts is not None:
            contents = self._asked(self.texts, table, contents, faults)
        elif columns.scored is not None:
            contents = _scored(columns.scored, table, contents, faults)
        overrides = _read_overrides(table, columns, faults)
        if any(GIVEN in override for override in overrides):
            overrides = self._give(contents, overrides, faults)
        for row in faults:
            contents[row], overrides[row] = None, {}
        rejected = tuple(Rejected(row_start + row, *faults[row].args) for row in sorted(faults))
        tenants = _cells(table, columns.tenant)
        return PromptBatch(row_start, ids, contents, overrides, tenants, rejected)

    def _give(
        self,
        contents: list[Content | None],
        overrides: list[dict[str, object]],
        faults: _Faults,
    ) -> list[dict[str, object]]:
        """Put what rows give their chat template into their contents; returns what is left."""
        for row, override in enumerate(overrides):
            content = contents[row]
            if GIVEN not in override or content is None or row in faults:
                continue
            if self.columns.conversation is None and isinstance(content, str | list):
                contents[row] = ChatPrompt(content, str(override[GIVEN]))
            else:
                faults[row] = _Fault("BadSamplingParams", _GIVES_NOTHING)
        return [{n: v for n, v in override.items() if n != GIVEN} for override in overrides]

    @property
    def _may_be_empty(self) -> bool:
        """Whether what is scored may stand at the beginning of a text."""
        scored = self.columns.scored
        return scored is not None and not scored.are_prompts

    def _contents(
        self, table: pa.Table, orders: Sequence[Sequence[int]] | None, faults: _Faults
    ) -> list[Content | None]:
        if self.template is not None:
            return self._rendered(self.template, table, orders, faults)
        columns = self.columns
        name = columns.prompt or columns.messages or columns.segments
        cells = python_cells(table.column(name))
        for row, cell in enumerate(cells):
            if cell is None:
                faults.setdefault(row, _Fault("NullPrompt", "the prompt is null"))
            elif not cell and columns.prompt is not None and not self._may_be_empty:
                faults.setdefault(row, _Fault("EmptyPrompt", "the prompt is empty"))
        if columns.messages is not None:
            return _each(lambda cell: _attempt("BadMessages", read_messages, cell), cells, faults)
        if columns.segments is not None:
            return _each(lambda cell: _attempt("BadSegments", read_segments, cell), cells, faults)
        if columns.documents is None:
            return cells
        pairs = list(zip(python_cells(table.column(columns.documents)), cells, strict=True))
        return _each(lambda pair: _attempt("BadSegments", _read_pair, pair), pairs, faults)

    def _rendered(
        self,
        template: PromptTemplate,
        table: pa.Table,
        orders: Sequence[Sequence[int]] | None,
        faults: _Faults,
    ) -> list[Content | None]:
        """Rows that can be read are rendered together: each call costs a message to a process."""
        values = _records(table, template.columns)
        cells = list(zip(values, orders or repeat(None, len(values)), strict=True))
        fit = [
            row for row, (value, _) in enumerate(cells)
            if row not in faults and value is not UNREADABLE
        ]  # fmt: skip
        found: list[Any] = [value for value, _ in cells]
        for row, text in zip(fit, template.render_all([cells[row] for row in fit]), strict=True):
            found[row] = text
        return _each(lambda text: _attempt("TemplateError", _read_rendered, text), found, faults)

    def _asked(
        self,
        texts: QuestionTexts,
        table: pa.Table,
        contents: list[Content | None],
        faults: _Faults,
    ) -> list[Content | None]:
        """The same prompts, with what is asked about them; rendered together as `_rendered` is."""
        scored = self.columns.scored
        assert scored is not None and scored.sheet is not None
        cells = _records(table, texts.columns)
        for row, cell in enumerate(cells):
            if cell is UNREADABLE:
                faults.setdefault(row, _Fault("BadQuestion", _BEYOND))
        found: list[Content | None] = [None] * len(cells)
        fit = [row for row in range(len(cells)) if row not in faults]
        for row, said in zip(fit, texts.of_rows([cells[row] for row in fit]), strict=True):
            content = contents[row]
            if isinstance(said, BadCell):
                faults[row] = _Fault("BadQuestion", str(said))
            elif isinstance(content, str | list):
                found[row] = AskedPrompt(content, said, scored.sheet)
            else:
                faults[row] = _Fault("BadPrompt", _BEYOND)
        return found


def _scored(
    choices: Choices, table: pa.Table, contents: list[Content | None], faults: _Faults
) -> list[Content | None]:
    """The same prompts, as contexts of what is scored behind them."""
    found = _each(
        lambda cell: _attempt("BadChoices", choices.read, cell), choices.cells(table), faults
    )
    pairs = zip(contents, found, strict=True)
    return [
        ScoredPrompt(content, texts) if isinstance(content, str | list) and texts is not None
        else content
        for content, texts in pairs
    ]  # fmt: skip


def _read_pair(pair: tuple[object, str]) -> SegmentedPrompt:
    documents, question = pair
    if UNREADABLE in pair:
        raise BadCell(_BEYOND)
    return read_documents(documents, question)


def _read_rendered(rendered: str | BadCell) -> str:
    if isinstance(rendered, BadCell):
        raise rendered
    return read_text(rendered)


_GIVES_NOTHING = (
    "the row gives its chat template tools or arguments, which turns of conversations and prompts "
    "in segments cannot have; leave them out, or name arguments for all by --chat-template-kwargs"
)
_BEYOND = (
    "a value of the row is beyond what can be read: a time after the year 9999, or bytes that are "
    "not text in UTF-8"
)


def _each(read: Callable[[Any], Value], cells: Sequence[Any], faults: _Faults) -> list[Any]:
    """What `read` makes of each cell, None where it raises _Fault or there is one already."""
    found: list[Any] = [None] * len(cells)
    for row, cell in enumerate(cells):
        if row not in faults:
            try:
                found[row] = read(cell)
            except _Fault as fault:
                faults[row] = fault
    return found


def _attempt(error_type: str, read: Callable[[Any], Value], cell: Any) -> Value:
    """What `read` makes of a cell. Raises _Fault, whatever it raises but UsageError."""
    if cell is UNREADABLE:
        raise _Fault(error_type, _BEYOND)
    try:
        return read(cell)
    except BadCell as error:
        raise _Fault(error_type, str(error)) from None
    except UsageError:
        raise
    except Exception as error:  # what it is we cannot know; what it says may quote the row
        raise _Fault(error_type, f"the row cannot be read ({type(error).__name__})") from None


def _read_overrides(
    table: pa.Table, columns: ColumnMap, faults: _Faults
) -> list[dict[str, object]]:
    """Of the columns, and of `sampling_params` what they leave open. Equal rows are read once."""
    asked = (columns.sampling_params, columns.json_schema, *columns.fields)
    names = [name for name in asked if name is not None]
    if not names:
        return [{}] * table.num_rows
    known: dict[Any, dict[str, object]] = {}

    def read(cells: tuple[Any, ...]) -> dict[str, object]:
        key = _as_key(cells)
        found = known.get(key) if key is not None else None
        if found is None:
            if UNREADABLE in cells:
                raise _Fault("BadSamplingParams", _BEYOND)
            found = _attempt(
                "BadSamplingParams", lambda said: _override(names, said, columns), cells
            )
            if key is not None:
                known[key] = found
        return found

    rows = list(zip(*(_field_cells(table, name, columns) for name in names), strict=True))
    return [override or {} for override in _each(read, rows, faults)]


def _field_cells(table: pa.Table, name: str, columns: ColumnMap) -> list[Any]:
    """The values; of a column that is marked as JSON what they say, unless it is read whole."""
    column = table.column(name)
    cells = python_cells(column)
    if name in (columns.sampling_params, columns.json_schema):
        return cells
    if not isinstance(column.type, pa.JsonType):
        return [without_gaps(cell) for cell in cells]
    return [_said_by_json(cell) if isinstance(cell, str) else cell for cell in cells]


def _said_by_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return UNREADABLE


def _as_key(cells: tuple[Any, ...]) -> Any:
    """None for lists and structs. Equal numbers of two types are two keys."""
    try:
        hash(cells)
    except TypeError:
        return None
    return cells, tuple(map(type, cells))


def _override(names: Sequence[str], cells: Sequence[Any], columns: ColumnMap) -> dict[str, object]:
    """Raises BadCell."""
    said = dict(zip(names, cells, strict=True))
    sampling = said.pop(columns.sampling_params or "", None)
    own = {} if sampling is None else read_sampling(sampling)
    if columns.json_schema is not None:
        cell = said.pop(columns.json_schema)
        own = own | {"constraint": _only_constraint(own, read_schema(cell))}
    return own | read_fields(said)


def _only_constraint(own: dict[str, object], constraint: str) -> str:
    if own.get("constraint", constraint) != constraint:
        raise BadCell("sampling_params and the schema of the row differ; leave one of them out")
    return constraint


def _records(table: pa.Table, names: Sequence[str]) -> list[Any]:
    """Of each row these cells by name; UNREADABLE where one cannot be read."""
    if not names:
        return [{}] * table.num_rows
    rows = zip(*(python_cells(table.column(name)) for name in names), strict=True)
    return [UNREADABLE if UNREADABLE in row else dict(zip(names, row, strict=True)) for row in rows]


def _cells(table: pa.Table, name: str | None) -> list[Any]:
    """Of a column of text; nulls without a column."""
    if name is None:
        return [None] * table.num_rows
    cells: list[Any] = table.column(name).to_pylist()
    return cells


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


def rows_with_tools(table: pa.Table, columns: ColumnMap) -> list[bool]:
    """Of each row of the input that could be run, whether its answer may call tools."""
    faults: _Faults = {}
    overrides = _read_overrides(table, columns, faults)
    return ["tools" in json.loads(str(override.get(GIVEN, "{}"))) for override in overrides]
