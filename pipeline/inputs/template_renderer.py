"""A template of the user's at work, in a process of its own. Knows no table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.runtime import TemplateReference

from pipeline.confined import Fault
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.sandbox import Sandbox
from pipeline.time_limit import TimeLimit, TookTooLong

Item = tuple[Mapping[str, Any], Sequence[str]]
"""The cells of a row by name, and the names that `fields(...)` lists, in this row's order."""


class Renderer:
    """A compiled template. Raises what Jinja and Python raise of one that is none."""

    def __init__(self, source: str, known: Sequence[str], has_fields: bool, seconds: float) -> None:
        """`known`: the table's columns, which come before names of Jinja's."""
        self.environment = make_environment(known)
        self._template = self.environment.from_string(source)
        self._has_fields = has_fields
        self._limit = TimeLimit(seconds)

    def __call__(self, item: Item) -> str | Fault:
        """The prompt of a row."""
        row, listed = item
        pairs = [(name, row[name]) for name in listed]
        own = {"fields": lambda *names: pairs} if self._has_fields else {}
        try:
            with self._limit:
                return self._template.render(row, **own)
        except BadCell as error:
            return Fault(f"line {_line(error)} of the template {error}")
        except TookTooLong as error:
            most = self._limit.seconds
            return Fault(
                f"line {_line(error)} of the template takes over {most:g} s on this row", True
            )
        except Exception as error:  # a template is code: it can raise anything
            kind = type(error).__name__
            return Fault(f"line {_line(error)} of the template fails on this row ({kind})")


def make_environment(known: Sequence[str]) -> Sandbox:
    """Where templates over these columns are compiled; nothing is computed yet."""
    environment = Sandbox(
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        keep_trailing_newline=True,
        optimized=False,
    )
    for name in set(known) & environment.globals.keys():
        del environment.globals[name]
    return environment


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
