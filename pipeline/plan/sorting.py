"""The order of all prompts by their token ids, out of core. Knows no tree and no text.

Rows are dealt to partitions by splitters from a sample, and one partition is in memory at a time:

```
 sample ─► splitters  s0 | s1 | s2        partition 0: rows < s0, 1: rows = s0, 2: between, ...
 table  ─► partition k: read its rows ─► sort ─► compare neighbours ─► order, shared
```

Rows that equal a splitter need neither memory nor sorting, so a prompt that makes up half of the
file is no problem. The result depends on the ids alone, not on the partitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.plan.token_table import WORD_BYTES, TokenTable

SORT_BYTES = 1 << 30
"""Bytes of ids to sort at a time, unless said otherwise; the keys and views double it."""
_SAMPLES = 200  # rows of the sample for each partition
_PAIRS = 1 << 15  # compared at a time: their words stay in a core's cache
_STEP = 8  # words compared before looking who is still equal


class SortedRows(NamedTuple):
    """`order`: [present] int64, rows with tokens by (tenant, ids, row); `shared`: [present] int64,
    tokens in common with the row before, 0 for the first and where the tenant changes."""

    order: NDArray[np.int64]
    shared: NDArray[np.int64]

    def is_new(self, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[present] whether a row's prompt is not the one before; `lengths` in the same order."""
        is_new = np.ones(len(self.order), bool)
        is_new[1:] = (self.shared[1:] != lengths[1:]) | (self.shared[1:] != lengths[:-1])
        return is_new


@dataclass(frozen=True)
class _Block:
    """Some rows of the table: row `rows[i]` is `words[start[i] : start[i + 1]]`.

    `has_tenants`: some row of the whole table has another tenant than 0, so keys name it.
    """

    rows: NDArray[np.int64]
    words: NDArray[np.uint64]
    start: NDArray[np.int64]
    tenant: NDArray[np.int64]
    has_tenants: bool

    def keys(self) -> pl.Series:
        """[rows] binary that sorts as (tenant, ids); a longer row of the same zeros ties."""
        ids = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self.rows),
            [None, pa.py_buffer(self.start * WORD_BYTES), pa.py_buffer(self.words)],
        )  # fmt: skip
        if self.has_tenants:
            first = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(8), len(self.rows), [None, pa.py_buffer(self.tenant.astype(">i8"))]
            )
            nothing = pa.scalar(b"", pa.large_binary())
            ids = pc.binary_join_element_wise(first.cast(pa.large_binary()), ids, nothing)
        return pl.Series(ids)


def sort_rows(
    table: TokenTable, tenant: NDArray[np.int64], sort_bytes: int = SORT_BYTES
) -> SortedRows:
    """Sort the non-empty rows; `tenant`: [rows] int64, 0 or more.

    Rows of two tenants never share a prompt or a prefix. Equal prompts come in row order.
    """
    num_present = int(np.count_nonzero(table.lengths))
    result = SortedRows(np.empty(num_present, np.int64), np.zeros(num_present, np.int64))
    done = 0
    for block, is_one_prompt in _partitions(table, tenant, sort_bytes):
        order, same = _sort_block(table, block, is_one_prompt)
        stop = done + len(order)
        result.order[done:stop] = order
        result.shared[done + 1 : stop] = same
        if done:
            result.shared[done] = _shared_by_two(table, tenant, *result.order[done - 1 : done + 1])
        done = stop
    return result


def _partitions(
    table: TokenTable, tenant: NDArray[np.int64], sort_bytes: int
) -> Iterator[tuple[_Block, bool]]:
    """Blocks whose keys rise from one to the next; whether all rows of one have the same key."""
    present = np.flatnonzero(table.lengths)
    if not len(present):
        return
    size = int(table.offsets[-1]) * table.flat.dtype.itemsize
    if size <= sort_bytes:
        yield _read(table, tenant, present), False
        return
    number = -(-2 * size // sort_bytes)
    most = max(number, len(present) * sort_bytes // size)  # as many as fit
    sample = _sample(present, min(number * _SAMPLES, most))
    splitters = _choose_splitters(_read(table, tenant, sample), number)
    part_of_row = np.full(len(table), -1, np.int16)
    for low, high in table.chunks():
        block = _read(table, tenant, present[_between(present, low, high)])
        keys = block.keys()
        below, upto = (splitters.search_sorted(keys, side) for side in ("left", "right"))
        part_of_row[block.rows] = below.to_numpy() + upto.to_numpy()  # odd: equal to a splitter
    for part in range(2 * len(splitters) + 1):
        rows = np.flatnonzero(part_of_row == part)
        if len(rows):
            nothing = np.zeros(0, np.uint64), np.zeros(1, np.int64)
            is_one = part % 2 == 1
            block = (
                _Block(rows, *nothing, tenant[rows], True) if is_one else _read(table, tenant, rows)
            )
            yield block, is_one


def _sample(rows: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
    """Some of `rows`, at random: every n-th would miss templates that take turns."""
    chosen = np.random.default_rng(0).integers(0, len(rows), min(at_most, len(rows)))
    return rows[np.unique(chosen)]


def _choose_splitters(block: _Block, number: int) -> pl.Series:
    """At most `number - 1` distinct keys that cut the block into parts of like weight."""
    keys = block.keys()
    order = keys.arg_sort().to_numpy().astype(np.int64)
    weight = np.cumsum(np.diff(block.start)[order])
    cuts = np.searchsorted(weight, weight[-1] * np.arange(1, number) / number)
    return keys.gather(order[np.unique(cuts)]).unique(maintain_order=True)


def _read(table: TokenTable, tenant: NDArray[np.int64], rows: NDArray[np.int64]) -> _Block:
    """These rows, ascending, gathered chunk by chunk."""
    slots = WORD_BYTES // table.flat.dtype.itemsize
    width = (table.offsets[rows + 1] - table.offsets[rows]) // slots
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(width)])
    if start[-1] * slots == table.offsets[-1]:  # only empty rows are left out
        return _Block(
            rows, table.read_words(0, len(table)), start, tenant[rows], bool(tenant.any())
        )
    words = np.empty(int(start[-1]), np.uint64)
    for low, high in table.chunks():
        inside = _between(rows, low, high)
        if inside.start == inside.stop:
            continue
        here = rows[inside]
        first = (table.offsets[here] - table.offsets[low]) // slots
        target = words[start[inside.start] : start[inside.stop]]
        shift = np.repeat(first - (start[inside] - start[inside.start]), width[inside])
        np.take(table.read_words(low, high), shift + np.arange(len(target)), out=target)
    return _Block(rows, words, start, tenant[rows], bool(tenant.any()))


def _between(rows: NDArray[np.int64], low: int, high: int) -> slice:
    """Places of `[low, high)` in ascending `rows`."""
    return slice(*np.searchsorted(rows, [low, high]).tolist())


def _sort_block(
    table: TokenTable, block: _Block, is_one_prompt: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows in order, tokens that neighbours share [rows - 1])."""
    if is_one_prompt:
        order = np.lexsort((block.rows, table.lengths[block.rows]))
        lengths = table.lengths[block.rows[order]]
        return block.rows[order], np.minimum(lengths[:-1], lengths[1:])
    order = block.keys().arg_sort().to_numpy().astype(np.int64)
    slots = WORD_BYTES // table.flat.dtype.itemsize
    same = _equal_words(block, order, slots)
    width = np.diff(block.start)[order] * slots
    tenant = block.tenant[order]
    is_tied = (same == width[1:]) & (width[1:] == width[:-1]) & (tenant[1:] == tenant[:-1])
    same[tenant[1:] != tenant[:-1]] = 0
    rows = _order_ties(block.rows[order], table.lengths, is_tied)
    lengths = table.lengths[rows]
    return rows, np.minimum(same, np.minimum(lengths[:-1], lengths[1:]))


def _order_ties(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], is_tied: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Runs of rows with equal bytes by (length, row): [1, 0] and [1] are the same padded."""
    in_run = np.zeros(len(rows), bool)
    in_run[1:] |= is_tied
    in_run[:-1] |= is_tied
    indices = np.flatnonzero(in_run)
    run = np.cumsum(np.append(False, ~is_tied))[indices]
    chosen = rows[indices]
    rows[indices] = chosen[np.lexsort((chosen, lengths[chosen], run))]
    return rows


def _equal_words(block: _Block, order: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    """Slots, padding included, that neighbours in `order` have in common: [len(order) - 1]."""
    result = np.empty(max(0, len(order) - 1), np.int64)
    width = np.diff(block.start)
    for low in range(0, len(result), _PAIRS):
        pair = order[low : low + _PAIRS + 1]
        limit = np.minimum(width[pair[:-1]], width[pair[1:]])
        left, right = block.start[pair[:-1]], block.start[pair[1:]]
        result[low : low + len(limit)] = _compare(block.words, left, right, limit, slots)
    return result


def _compare(
    words: NDArray[np.uint64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    limit: NDArray[np.int64],
    slots: int,
) -> NDArray[np.int64]:
    """Slots in common from words `left` and `right` on, up to `limit` words: [pairs]."""
    common = limit * slots
    todo = np.arange(len(limit))
    step = np.arange(_STEP)
    for depth in range(0, int(limit.max(initial=0)), _STEP):
        todo = todo[limit[todo] > depth]
        here = depth + step
        differ = words.take(left[todo, None] + here, mode="clip")
        differ ^= words.take(right[todo, None] + here, mode="clip")
        first = (differ != 0).argmax(1)
        bits = differ[np.arange(len(todo)), first]
        found = np.flatnonzero(bits)
        at = (depth + first[found]) * slots + _equal_slots(bits[found], slots)
        common[todo[found]] = np.minimum(common[todo[found]], at)
        todo = np.delete(todo, found)
        if not len(todo):
            break
    return common


def _equal_slots(differ: NDArray[np.uint64], slots: int) -> NDArray[np.int64]:
    """Leading slots without a differing bit; the first slot has the lowest bits of a word."""
    lowest = differ & (~differ + np.uint64(1))
    bit = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
    return bit // (8 * WORD_BYTES // slots)


def _shared_by_two(
    table: TokenTable, tenant: NDArray[np.int64], before: np.int64, after: np.int64
) -> int:
    if tenant[before] != tenant[after]:
        return 0
    a, b = table[int(before)], table[int(after)]
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
