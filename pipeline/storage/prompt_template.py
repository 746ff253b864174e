"""Prompts from the columns of a table by a Jinja template. Knows no files of rows.

A template is code of the user's, rows are text of anybody's: it runs in Jinja's sandbox, sees the
columns that it names and nothing else, and what it says when it fails leaves out the row's values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import UsageError
from pipeline.storage.cells import BadCell

_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError,
    AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


class PromptTemplate:
    """A template; `columns` are the names that it asks for, sorted."""

    def __init__(self, source: str, name: str = "the template") -> None:
        """Raises UsageError with the line if it is not valid Jinja."""
        self._name = name
        self._source = source
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_refuse_null, keep_trailing_newline=True
        )
        try:
            self.columns = tuple(sorted(meta.find_undeclared_variables(environment.parse(source))))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{name}, line {error.lineno}, is not valid Jinja: {error.message}"
            ) from error

    @classmethod
    def read(cls, path: Path) -> PromptTemplate:
        """From a file. Raises UsageError."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeError) as error:
            raise UsageError(f"cannot read the template {path} ({error}); correct it") from error

    def check_columns(self, known: Sequence[str]) -> None:
        """Raises UsageError with line and column if it asks for what the table does not have."""
        for column in self.columns:
            if column not in known:
                found = re.search(rf"\b{re.escape(column)}\b", self._source)
                before = self._source[: found.start() if found else 0]
                line, place = before.count("\n") + 1, len(before) - before.rfind("\n")
                raise UsageError(
                    f"{self._name}, line {line}, column {place}, asks for {column!r}, which the "
                    f"input does not have (it has {', '.join(known)})"
                )

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises BadCell, without quoting the row."""
        try:
            return self._template.render(row)
        except BadCell as error:
            raise BadCell(f"line {_line(error)} of the template {error}") from None
        except _FAULTS as error:
            kind = type(error).__name__
            raise BadCell(
                f"line {_line(error)} of the template fails on this row ({kind})"
            ) from None


def _refuse_null(value: object) -> object:
    if value is None:
        raise BadCell("prints a null; write {{ name or '' }} where that means nothing")
    return value


def _line(error: BaseException) -> int:
    """Jinja puts the template's own frames into the traceback."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
