"""Which turn of which conversation each row is, before a prompt is read.

```
 rows of the file     a 3   b 0   a 0   c -   a 7      conversation and turn; c has no number
 conversations        a: rows 2, 0, 4      b: row 1     c: row 3, which cannot run
```

A conversation is known by its tenant and its id. Its rows may lie anywhere; what counts is the
order of their numbers, and a row that has none has no place: nobody knows what came before the
others of its conversation then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.conversation_settings import ConversationSettings
from pipeline.errors import InputError
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.named_columns import find_column, listed
from pipeline.prompts import PromptBatch, Rejected, TurnPrompt
from pipeline.storage.plain_types import is_text

_USUAL = ("conversation_id", "turn")
_MOST_TWICE = 3  # turns that a message names
_MOST_CHARACTERS = 40  # of the id of a conversation in a message
_PLACED, _NULL, _BAD = range(3)
_FAULTS = {
    _NULL: ("NullTurn", "the row has no number in the column {turn!r}, which orders the turns"),
    _BAD: ("BadTurn", "the turn of the row in the column {turn!r} is no whole number of 64 bits"),
}


@dataclass(frozen=True, eq=False)
class Turns:
    """Turns of conversation c, in order, are the rows `order[bounds[c] : bounds[c + 1]]`; those
    without a place come first.

    By row: `conversation` int64, -1 for none; `turn` int64; `is_first` bool; `faults`: why a row
    has no place. int64 all but these.
    """

    conversation: NDArray[np.int64]
    turn: NDArray[np.int64]
    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    is_first: NDArray[np.bool_]
    faults: dict[int, tuple[str, str]]

    def numbers(self, rows: Iterable[int]) -> list[int | None]:
        """The turn of each row; None where it has no place."""
        return [None if row in self.faults else int(self.turn[row]) for row in rows]

    def apply(self, batch: PromptBatch) -> PromptBatch:
        """The rows as turns; those without a place cannot run."""
        rejected = {bad.row_index: bad for bad in batch.rejected}
        contents, overrides = list(batch.contents), list(batch.overrides)
        is_first = self.is_first[batch.row_start : batch.row_start + len(contents)].tolist()
        for index, (content, first) in enumerate(zip(contents, is_first, strict=True)):
            row = batch.row_start + index
            if row in self.faults:
                rejected.setdefault(row, Rejected(row, *self.faults[row]))
                contents[index], overrides[index] = None, {}
            elif isinstance(content, str | list):
                contents[index] = TurnPrompt(content, first)
        in_order = tuple(rejected[row] for row in sorted(rejected))
        return replace(batch, contents=contents, overrides=overrides, rejected=in_order)


def with_turn_columns(
    columns: ColumnMap, schema: pa.Schema, asked: ConversationSettings, name: str
) -> ColumnMap:
    """The same columns and, where rows are turns, those that say which; `name`: of the file.

    Raises InputError where one is missing, of the wrong type, or prompts are in segments.
    """
    if not asked.has_turns:
        found = [column for column in _USUAL if column in schema.names]
        idle = len(found) == len(_USUAL) and all(map(_looks_usual, map(schema.field, _USUAL)))
        return replace(columns, idle_turns=_USUAL) if idle else columns
    if columns.has_segments:
        raise InputError(
            f"prompts of {name} are in segments, and turns of conversations are not; name a column "
            "with --prompt-column or --messages-column"
        )
    said = (asked.conversation_column, asked.turn_column)
    conversation, turn = (
        _find(schema, column, usual, name) for column, usual in zip(said, _USUAL, strict=True)
    )
    if conversation == turn:
        raise InputError(f"the column {turn!r} cannot be conversation and turn; name two")
    for column, fits, wanted in (
        (conversation, _is_identity, "string or integer"),
        (turn, _is_number, "integer"),
    ):
        kind = schema.field(column).type
        if not fits(kind):
            raise InputError(
                f"column {column!r} of {name} has the type {kind}, not {wanted}; "
                "convert it or name another one"
            )
    taken = {conversation, turn}  # a turn may be called `n`, and is no field of a request then
    return replace(
        columns,
        conversation=conversation,
        turn=turn,
        fields=tuple(column for column in columns.fields if column not in taken),
        unused=tuple(column for column in columns.unused if column not in taken),
    )


def _find(schema: pa.Schema, said: str | None, usual: str, name: str) -> str:
    part = usual.removesuffix("_id")
    found = find_column(schema, said, (usual,), f"--{part}-column", name)
    if found is None:
        raise InputError(
            f"{name} has no column {usual!r} (it has {listed(schema)}); name yours with "
            f"--{part}-column"
        )
    return found


def _is_identity(kind: pa.DataType) -> bool:
    is_plain = is_text(kind) and not isinstance(kind, pa.JsonType)
    return bool(is_plain or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _is_number(kind: pa.DataType) -> bool:
    """Also floats: a column of integers with a gap is one of floats to pandas."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _looks_usual(field: pa.Field) -> bool:
    return (_is_identity if field.name == _USUAL[0] else _is_number)(field.type)


def read_turns(tables: Iterable[pa.Table], columns: ColumnMap) -> Turns:
    """From tables with the columns of conversation, turn and tenant, where there is one.

    Raises InputError where a conversation has a turn twice.
    """
    assert columns.conversation is not None and columns.turn is not None
    names = [pl.DataFrame(schema={"tenant": pl.String, "id": pl.String})]
    numbers, states = [np.zeros(0, np.int64)], [np.zeros(0, np.int8)]
    for table in tables:
        tenants = pa.nulls(len(table)) if columns.tenant is None else table[columns.tenant]
        ids = table[columns.conversation].cast(pa.large_string())
        names.append(_texts(tenants, ids))
        number, state = _whole_numbers(table[columns.turn].combine_chunks())
        numbers.append(number)
        states.append(state)
    keys, state = pl.concat(names), np.concatenate(states)
    turn = np.concatenate(numbers)
    conversation = _number(keys)
    order = np.lexsort((turn, state == _PLACED, conversation))
    order = order[conversation[order] >= 0]
    _refuse_twice(keys["id"], conversation[order], turn[order], state[order], order)
    bounds = np.searchsorted(conversation[order], np.arange(conversation.max(initial=-1) + 2))
    is_first = np.zeros(len(turn), bool)
    is_first[order[bounds[:-1]]] = True
    nowhere = f"the row has no conversation in the column {columns.conversation!r}"
    faults = dict.fromkeys(np.flatnonzero(conversation < 0).tolist(), ("NullConversation", nowhere))
    for row in np.flatnonzero((conversation >= 0) & (state != _PLACED)).tolist():
        kind, message = _FAULTS[int(state[row])]
        faults[row] = (kind, message.format(turn=columns.turn))
    return Turns(conversation, turn, order, bounds, is_first, faults)


def _texts(tenants: pa.ChunkedArray, ids: pa.ChunkedArray) -> pl.DataFrame:
    columns = {"tenant": tenants, "id": ids}
    table = pa.table({name: column.cast(pa.large_string()) for name, column in columns.items()})
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _number(keys: pl.DataFrame) -> NDArray[np.int64]:
    """Of each row, the number of its conversation in the order in which they appear."""
    known = keys.drop_nulls("id").unique(maintain_order=True).with_row_index("number")
    found = keys.join(
        known, on=["tenant", "id"], how="left", nulls_equal=True, maintain_order="left"
    )
    return found["number"].cast(pl.Int64).fill_null(-1).to_numpy()


def _whole_numbers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """(the numbers, 0 where there is none, and which there are)."""
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64), np.full(len(column), _NULL, np.int8)
    if pa.types.is_floating(column.type):
        values = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        is_bad = ~((values == np.floor(values)) & (np.abs(values) < 2.0**63))
    else:
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        is_bad = values > np.iinfo(np.int64).max
    whole = np.where(is_bad, 0, values).astype(np.int64)
    return whole, np.where(is_null, _NULL, np.where(is_bad, _BAD, _PLACED)).astype(np.int8)


def _refuse_twice(
    ids: pl.Series,
    conversation: NDArray[np.int64],
    turn: NDArray[np.int64],
    state: NDArray[np.int8],
    row: NDArray[np.int64],
) -> None:
    """Raises InputError where two neighbours in order are the same turn."""
    is_placed = state == _PLACED
    is_same = (conversation[1:] == conversation[:-1]) & (turn[1:] == turn[:-1])
    twice = np.flatnonzero(is_same & is_placed[1:] & is_placed[:-1])
    if not len(twice):
        return
    said = []
    for at in twice[:_MOST_TWICE].tolist():
        name = ids[int(row[at])]
        short = name if len(name) <= _MOST_CHARACTERS else f"{name[:_MOST_CHARACTERS]}..."
        said.append(f"turn {turn[at]} of {short!r} in the rows {row[at]} and {row[at + 1]}")
    more = len(twice) - len(said)
    raise InputError(
        f"each turn of a conversation must come once, but these come twice: {', '.join(said)}"
        f"{f' and {more:,} more' if more else ''}; drop one of the two or number them anew"
    )
