"""Prompts from the columns of a table by a Jinja template. Knows no files of rows.

A template is code of the user's, rows are text of anybody's: it runs in a sandbox, in a process of
its own with limits of time and memory, sees the columns that it names and nothing else, and what it
says when it fails leaves out the row's values. The same row must give the same prompt tomorrow, so
nothing random is there either.

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

from pipeline.confined import Confined, Ended, Fault, NotMade
from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.template_renderer import Renderer, make_environment

_MOST_SECONDS = 10.0  # for a row
_MOST_SLOW_ROWS = 10  # one after another
_GRACE_S = 1.0  # before a single step that does not end is ended with its process


class PromptTemplate:
    """A template over a table.

    `columns` are those of it that the template asks for, sorted; `fields` those that it lists by
    `fields(...)`, as it lists them.
    """

    def __init__(
        self,
        source: str,
        known: Sequence[str],
        name: str = "the template",
        *,
        may_be_constant: bool = False,
    ) -> None:
        """`known`: the table's columns; `may_be_constant`: it may ask for none of them.

        Raises UsageError with line and column of what is wrong.
        """
        self._name = name
        self._source = source
        self._num_slow = 0
        environment = make_environment(known)
        try:
            tree = environment.parse(source)
            self.fields = _find_fields(tree, name)
            named = _find_names(tree, environment) - ({"fields"} if self.fields else set())
            self.columns = tuple(sorted({*named, *self.fields}))
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{name}, line {error.lineno}, is not valid Jinja: {error.message}"
            ) from error
        except RecursionError as error:
            raise UsageError(f"{name} is nested too deep; nest less and shorten it") from error
        for other in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
            raise UsageError(f"{name}, line {other.lineno}: other files cannot be read; copy it in")
        if not self.columns and not may_be_constant:
            raise UsageError(f"{name} names no column, so all prompts would be the same")
        self._check_columns(known)
        arguments = (source, tuple(known), bool(self.fields), _MOST_SECONDS)
        self._renderer = Confined(Renderer, arguments, _MOST_SECONDS * 1.2 + _GRACE_S)
        try:
            self._renderer.start()
        except NotMade as error:
            raise UsageError(f"{name} {error}; nest less and shorten it") from error

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
        for column in self.columns:
            if column not in known:
                found = re.search(rf"\b{re.escape(column)}\b", self._source)
                before = self._source[: found.start() if found else 0]
                line, at = before.count("\n") + 1, len(before) - before.rfind("\n")
                raise UsageError(
                    f"{self._name}, line {line}, column {at}, asks for {column!r}, which the "
                    f"input does not have (it has {', '.join(known)})"
                )

    def render(self, row: Mapping[str, Any], order: Sequence[int] | None = None) -> str:
        """The prompt of a row, see `render_all`. Raises BadCell, UsageError."""
        (text,) = self.render_all([(row, order)])
        if isinstance(text, BadCell):
            raise text
        return text

    def render_all(
        self, rows: Sequence[tuple[Mapping[str, Any], Sequence[int] | None]]
    ) -> list[str | BadCell]:
        """The prompt of each row, or why there is none, without quoting the row.

        With a row comes an order: indices of `fields`, each once; None: as the template lists them.
        Raises UsageError where row after row takes too long.
        """
        items = [
            (row, self.fields if order is None else [self.fields[index] for index in order])
            for row, order in rows
        ]
        return [self._text(result) for result in self._renderer.map(items)]

    def _text(self, result: str | Fault | Ended) -> str | BadCell:
        if isinstance(result, str):
            self._num_slow = 0
            return result
        if isinstance(result, Ended):
            taken = f"takes over {_MOST_SECONDS:g} s" if result.is_slow else "takes all memory"
            result = Fault(f"the template {taken} on this row", result.is_slow)
        self._num_slow = self._num_slow + 1 if result.is_slow else 0
        if self._num_slow >= _MOST_SLOW_ROWS:
            raise UsageError(
                f"{self._name} takes over {_MOST_SECONDS:g} s on row after row; simplify it"
            )
        return BadCell(result.message)


def _find_names(tree: nodes.Template, environment: jinja2.Environment) -> set[str]:
    """As `meta.find_undeclared_variables`, which would compute what is constant: `x if 1[1] else x`
    raises what a template may raise on its rows alone."""
    generator = meta.TrackingCodeGenerator(environment)
    generator.optimizer = None
    generator.visit(tree)
    return generator.undeclared_identifiers


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
