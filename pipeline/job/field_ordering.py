"""Which order of a template's fields saves most, for the rows of an input. Keeps no value.

Values are told apart by a hash of 64 bits: two that collide cost some sharing and change no prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.inputs.prompt_source import PromptSource
from pipeline.plan.field_order import FieldTable, best_fixed_order, best_order, given_order

_CELL_BYTES = 60  # of memory, measured
_MOST_FIELDS = 255
_NOT_PLAIN = (pl.List, pl.Array, pl.Struct, pl.Binary, pl.Object)


@dataclass(frozen=True)
class FieldSaving:
    """Shares of the fields' text, in bytes, that rows share with others.

    `given`: in the template's order, `fixed`: in `fixed_order`, the same in all rows, `best`: in an
    order per row, `bound`: no order shares more. `is_applied`: whether the prompts have the best.
    """

    given: float
    fixed: float
    best: float
    bound: float
    fixed_order: list[str]
    given_order: list[str]
    is_applied: bool

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values, with a sentence for a person."""
        return asdict(self) | {"text": self._text()}

    def _text(self) -> str:
        shares = (
            f"{self.best:.1%} shared in an order per row; no order shares above {self.bound:.1%}"
        )
        if self.is_applied:
            return f"{shares}; as the template lists them: {self.given:.1%}"
        listed = f"{self.given:.1%} shared as listed; {shares} (--reorder-fields)"
        return listed + self._remedy()

    def _remedy(self) -> str:
        if self.fixed_order == self.given_order:
            return ""
        indices = {name: self.fixed_order.index(name) for name in self.given_order}
        early = [name for index, name in enumerate(self.given_order) if indices[name] > index]
        verb = "varies" if len(early) == 1 else "vary"
        order = ", ".join(self.fixed_order)
        return f"; {', '.join(early)} {verb} first: list {order} to share {self.fixed:.1%}"


def memory_needed(source: PromptSource) -> int:
    """Bytes that `order_fields` takes, at most."""
    return source.num_rows * len(source.fields) * _CELL_BYTES


def order_fields(
    source: PromptSource, plan_memory: int, is_applied: bool
) -> tuple[NDArray[np.uint8], FieldSaving]:
    """[rows, fields] indices of the template's list, for all rows of `source`; what that saves.

    Raises UsageError if its template lists none or memory is short, InputError on a damaged page.
    """
    names = list(source.fields)
    if not names:
        raise UsageError(
            "--reorder-fields needs a --template that lists fields, like "
            "{% for name, value in fields('title', 'review') %}{{ name }}: {{ value }}{% endfor %}"
        )
    if len(names) > _MOST_FIELDS:
        raise UsageError(f"fields(...) lists {len(names)} columns; at most {_MOST_FIELDS} work")
    needed = memory_needed(source)
    if needed > plan_memory:
        raise UsageError(
            f"ordering {len(names)} fields of {source.num_rows:,} rows takes "
            f"{needed / 2**30:.1f} GiB; give it --plan-memory {-(-needed // 2**30)}GiB"
        )
    table = _read_table(names, source.iter_fields())
    order, given = best_order(table), given_order(table)
    fixed = best_fixed_order(table, order)
    total = max(1, table.total())
    saving = FieldSaving(
        given=table.shared(given) / total,
        fixed=table.shared(given[:, fixed]) / total,
        best=table.shared(order) / total,
        bound=table.most_shared() / total,
        fixed_order=[names[index] for index in fixed],
        given_order=names,
        is_applied=is_applied,
    )
    return order, saving


def _read_table(names: list[str], batches: Iterable[pl.DataFrame]) -> FieldTable:
    hashes: list[list[NDArray[np.uint64]]] = [[] for _ in names]
    lengths: list[list[NDArray[np.int32]]] = [[] for _ in names]
    for batch in batches:
        for index, name in enumerate(names):
            texts = _texts(batch[name])
            hashes[index].append(texts.hash().to_numpy())
            lengths[index].append(texts.str.len_bytes().fill_null(0).cast(pl.Int32).to_numpy())
    codes, costs = [], []
    for index, name in enumerate(names):
        found = np.unique(np.concatenate(hashes[index]), return_index=True, return_inverse=True)
        codes.append(found[2].astype(np.int32))
        # A template prints the name beside the value, and something between them.
        own = len(name.encode()) + 3
        costs.append(np.concatenate(lengths[index])[found[1]].astype(np.int64) + own)
        hashes[index].clear()
        lengths[index].clear()
    return FieldTable(tuple(codes), tuple(costs))


def _texts(values: pl.Series) -> pl.Series:
    if isinstance(values.dtype, _NOT_PLAIN):
        return pl.Series([repr(value) for value in values.to_list()], dtype=pl.String)
    return values.cast(pl.String)
