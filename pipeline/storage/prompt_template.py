"""Prompts from the columns of a table by a Jinja template. Knows no files of rows.

A template is code of the user's, rows are text of anybody's: it runs in a sandbox and for a limited
time, sees the columns that it names and nothing else, and what it says when it fails leaves out the
row's values. The same row must give the same prompt tomorrow, so nothing random is there either.

`fields("title", "stars")` is the list of these columns' names and values, in an order that may be
another one in each row: the only place where a planner may change a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import TemplateReference

from pipeline.errors import UsageError
from pipeline.storage.cells import BadCell
from pipeline.storage.sandbox import Sandbox
from pipeline.time_limit import TimeLimit, TookTooLong

# What Python says of code that nests too deeply, or of a number that is too long.
_NOT_COMPILED = (SyntaxError, RecursionError, ValueError, ArithmeticError, MemoryError)
_MOST_SECONDS = 10.0  # for a row
_MOST_SLOW_ROWS = 10


class PromptTemplate:
    """A template over a table.

    `columns` are those of it that the template asks for, sorted; `fields` those that it lists by
    `fields(...)`, as it lists them.
    """

    def __init__(self, source: str, known: Sequence[str], name: str = "the template") -> None:
        """`known`: the table's columns. Raises UsageError with the place of what is wrong."""
        self._name = name
        self._source = source
        self._limit = TimeLimit(_MOST_SECONDS)
        environment = Sandbox(
            undefined=jinja2.StrictUndefined, finalize=_printable, keep_trailing_newline=True
        )
        for global_name in set(known) & environment.globals.keys():
            del environment.globals[global_name]
        try:
            tree = environment.parse(source)
            self.fields = _find_fields(tree, name)
            named = meta.find_undeclared_variables(tree) - ({"fields"} if self.fields else set())
            self.columns = tuple(sorted({*named, *self.fields}))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{name}, line {error.lineno}, is not valid Jinja: {error.message}"
            ) from error
        except _NOT_COMPILED as error:
            raise UsageError(
                f"{name} cannot be compiled ({type(error).__name__}); nest less and shorten it"
            ) from error
        for other in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
            raise UsageError(f"{name}, line {other.lineno}: other files cannot be read; copy it in")
        self._check_columns(known)

    @classmethod
    def read(cls, path: Path, known: Sequence[str]) -> PromptTemplate:
        """From a file. Raises UsageError."""
        try:
            return cls(path.read_text(encoding="utf-8-sig"), known, str(path))
        except OSError as error:
            raise UsageError(f"cannot read the template {path} ({error.strerror})") from error
        except UnicodeError as error:
            raise UsageError(f"cannot read the template {path}: it is not UTF-8") from error

    def _check_columns(self, known: Sequence[str]) -> None:
        """Raises UsageError with line and column if it asks for what the table does not have."""
        if not self.columns:
            raise UsageError(f"{self._name} names no column, so all prompts would be the same")
        for column in self.columns:
            if column not in known:
                found = re.search(rf"\b{re.escape(column)}\b", self._source)
                before = self._source[: found.start() if found else 0]
                line, place = before.count("\n") + 1, len(before) - before.rfind("\n")
                raise UsageError(
                    f"{self._name}, line {line}, column {place}, asks for {column!r}, which the "
                    f"input does not have (it has {', '.join(known)})"
                )

    def render(self, row: Mapping[str, Any], order: Sequence[int] | None = None) -> str:
        """The prompt of a row. Raises BadCell, without quoting the row; UsageError where row after
        row takes too long.

        `order`: places in `fields`, each once; None: as the template lists them.
        """
        listed = self.fields if order is None else [self.fields[place] for place in order]
        pairs = [(name, row[name]) for name in listed]
        own = {"fields": lambda *names: pairs} if self.fields else {}
        try:
            with self._limit:
                return self._template.render(row, **own)
        except BadCell as error:
            raise BadCell(f"line {_line(error)} of the template {error}") from None
        except TookTooLong as error:
            self._check_patience()
            line, most = _line(error), self._limit.seconds
            raise BadCell(
                f"line {line} of the template takes over {most:g} s on this row"
            ) from None
        except Exception as error:  # a template is code: it can raise anything
            kind = type(error).__name__
            raise BadCell(
                f"line {_line(error)} of the template fails on this row ({kind})"
            ) from None

    def _check_patience(self) -> None:
        if self._limit.num_ended >= _MOST_SLOW_ROWS:
            raise UsageError(
                f"{self._name} takes over {self._limit.seconds:g} s on row after row; simplify it"
            ) from None


def _find_fields(tree: nodes.Template, template: str) -> tuple[str, ...]:
    """The names in the one call of `fields`, or nothing. Raises UsageError."""
    calls = [
        call
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == "fields"
    ]
    if not calls:
        return ()
    call = calls[-1]
    names = [arg.value if isinstance(arg, nodes.Const) else None for arg in call.args]
    texts = tuple(name for name in names if isinstance(name, str))
    where = f"{template}, line {call.lineno}"
    if len(calls) > 1:
        raise UsageError(f"{where}: fields(...) may be called once, since it has one order")
    if call.kwargs or call.dyn_args or call.dyn_kwargs or not texts or len(texts) < len(names):
        raise UsageError(f"{where}: fields(...) takes names of columns, each in quotes")
    if len(set(texts)) < len(texts):
        raise UsageError(f"{where}: fields(...) names a column twice")
    return texts


def _printable(value: object) -> object:
    """What `{{ value }}` prints. A null within `a ~ b` is out of its sight."""
    if value is None:
        raise BadCell("prints a null; write {{ name or '' }} where that means nothing")
    if not isinstance(value, jinja2.Undefined) and (
        callable(value) or isinstance(value, TemplateReference)
    ):
        raise BadCell("prints a function, not a value")
    return value


def _line(error: BaseException) -> int:
    """Jinja puts the template's own frames into the traceback."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
