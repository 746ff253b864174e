"""Rows of a table become prompts, or a reason why not, each by itself. Knows no files.

Whatever is wrong with a row, the rows beside it are read as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow as pa

from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import (
    read_documents,
    read_messages,
    read_segments,
    read_text,
)
from pipeline.inputs.chat_fields import GIVEN
from pipeline.inputs.choices import Choices
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.overrides import read_overrides
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.inputs.question_texts import QuestionTexts
from pipeline.inputs.row_faults import BEYOND, Fault, Faults, attempt, each
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
        faults |= {row: Fault("BadRequest", why) for row, why in refused if why is not None}
        contents = self._contents(table, orders, faults)
        if self.texts is not None:
            contents = self._asked(self.texts, table, contents, faults)
        elif columns.scored is not None:
            contents = _scored(columns.scored, table, contents, faults)
        overrides = read_overrides(table, columns, faults)
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
        faults: Faults,
    ) -> list[dict[str, object]]:
        """Put what rows give their chat template into their contents; returns what is left."""
        for row, override in enumerate(overrides):
            content = contents[row]
            if GIVEN not in override or content is None or row in faults:
                continue
            if self.columns.conversation is None and isinstance(content, str | list):
                contents[row] = ChatPrompt(content, str(override[GIVEN]))
            else:
                faults[row] = Fault("BadSamplingParams", _GIVES_NOTHING)
        return [{n: v for n, v in override.items() if n != GIVEN} for override in overrides]

    @property
    def _may_be_empty(self) -> bool:
        """Whether what is scored may stand at the beginning of a text."""
        scored = self.columns.scored
        return scored is not None and not scored.are_prompts

    def _contents(
        self, table: pa.Table, orders: Sequence[Sequence[int]] | None, faults: Faults
    ) -> list[Content | None]:
        if self.template is not None:
            return self._rendered(self.template, table, orders, faults)
        columns = self.columns
        name = columns.prompt or columns.messages or columns.segments
        cells = python_cells(table.column(name))
        for row, cell in enumerate(cells):
            if cell is None:
                faults.setdefault(row, Fault("NullPrompt", "the prompt is null"))
            elif not cell and columns.prompt is not None and not self._may_be_empty:
                faults.setdefault(row, Fault("EmptyPrompt", "the prompt is empty"))
        if columns.messages is not None:
            return each(lambda cell: attempt("BadMessages", read_messages, cell), cells, faults)
        if columns.segments is not None:
            return each(lambda cell: attempt("BadSegments", read_segments, cell), cells, faults)
        if columns.documents is None:
            return cells
        pairs = list(zip(python_cells(table.column(columns.documents)), cells, strict=True))
        return each(lambda pair: attempt("BadSegments", _read_pair, pair), pairs, faults)

    def _rendered(
        self,
        template: PromptTemplate,
        table: pa.Table,
        orders: Sequence[Sequence[int]] | None,
        faults: Faults,
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
        return each(lambda text: attempt("TemplateError", _read_rendered, text), found, faults)

    def _asked(
        self,
        texts: QuestionTexts,
        table: pa.Table,
        contents: list[Content | None],
        faults: Faults,
    ) -> list[Content | None]:
        """The same prompts, with what is asked about them; rendered together as `_rendered` is."""
        scored = self.columns.scored
        assert scored is not None and scored.sheet is not None
        cells = _records(table, texts.columns)
        for row, cell in enumerate(cells):
            if cell is UNREADABLE:
                faults.setdefault(row, Fault("BadQuestion", BEYOND))
        found: list[Content | None] = [None] * len(cells)
        fit = [row for row in range(len(cells)) if row not in faults]
        for row, said in zip(fit, texts.of_rows([cells[row] for row in fit]), strict=True):
            content = contents[row]
            if isinstance(said, BadCell):
                faults[row] = Fault("BadQuestion", str(said))
            elif isinstance(content, str | list):
                found[row] = AskedPrompt(content, said, scored.sheet)
            else:
                faults[row] = Fault("BadPrompt", BEYOND)
        return found


def _scored(
    choices: Choices, table: pa.Table, contents: list[Content | None], faults: Faults
) -> list[Content | None]:
    """The same prompts, as contexts of what is scored behind them."""
    found = each(
        lambda cell: attempt("BadChoices", choices.read, cell), choices.cells(table), faults
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
        raise BadCell(BEYOND)
    return read_documents(documents, question)


def _read_rendered(rendered: str | BadCell) -> str:
    if isinstance(rendered, BadCell):
        raise rendered
    return read_text(rendered)


_GIVES_NOTHING = (
    "the row gives its chat template tools or arguments, which turns of conversations and prompts "
    "in segments cannot have; leave them out, or name arguments for all by --chat-template-kwargs"
)


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
) -> tuple[list[str], dict[int, Fault]]:
    """Of each row an id, and why a row's own cannot be used."""
    if name is None:
        return make_ids(), {}
    column = table.column(name)
    found = text_of(column)
    without = [row for row, text in enumerate(found) if text is None]
    if not without:
        return found, {}  # type: ignore[return-value]
    made, is_null = make_ids(), column.is_null().to_pylist()
    null = Fault("NullId", f"the row has no id in the column {name!r}")
    bad = Fault("BadId", f"the id of the row in the column {name!r} is not text")
    ids = [made[row] if text is None else text for row, text in enumerate(found)]
    return ids, {row: null if is_null[row] else bad for row in without}
