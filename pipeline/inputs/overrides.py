"""What rows ask for besides their prompts: fields of sampling, templates and forms of answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import read_fields, read_sampling, read_schema, without_gaps
from pipeline.inputs.chat_fields import GIVEN
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.row_faults import BEYOND, Fault, Faults, attempt, each
from pipeline.storage.plain_types import UNREADABLE, python_cells


def read_overrides(table: pa.Table, columns: ColumnMap, faults: Faults) -> list[dict[str, object]]:
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
                raise Fault("BadSamplingParams", BEYOND)
            found = attempt(
                "BadSamplingParams", lambda said: _override(names, said, columns), cells
            )
            if key is not None:
                known[key] = found
        return found

    rows = list(zip(*(_field_cells(table, name, columns) for name in names), strict=True))
    return [override or {} for override in each(read, rows, faults)]


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


def rows_with_tools(table: pa.Table, columns: ColumnMap) -> list[bool]:
    """Of each row of the input that could be run, whether its answer may call tools."""
    faults: Faults = {}
    overrides = read_overrides(table, columns, faults)
    return ["tools" in json.loads(str(override.get(GIVEN, "{}"))) for override in overrides]
