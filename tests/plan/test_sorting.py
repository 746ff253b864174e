"""The order of prompts against Python's own sort, whatever the memory and however rows lie."""

from __future__ import annotations

from itertools import pairwise
from tempfile import TemporaryFile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import sorting, token_table
from pipeline.plan.sorting import SortedRows, sort_rows
from pipeline.plan.token_table import TokenFile, TokenTable, narrowest_dtype
from tests.plan.trie_oracle import Drawn, drawn_rows


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def check(drawn: Drawn, found: SortedRows) -> None:
    """Seen red: ties of padded rows left as they came, tenants ignored, a splitter's rows lost."""
    expected = sorted(
        (tenant, ids, row)
        for row, (tenant, ids) in enumerate(zip(drawn.tenants, drawn.rows, strict=True))
        if ids
    )
    assert found.order.tolist() == [row for _, _, row in expected]
    shared = [common(a[1], b[1]) * (a[0] == b[0]) for a, b in pairwise(expected)]
    assert found.shared.tolist() == [0, *shared][: len(expected)]


@given(drawn_rows(num_tenants=3), st.sampled_from([2**16, 2**16 + 1]))
def test_rows_are_sorted_by_tenant_ids_and_row(drawn: Drawn, vocabulary_size: int) -> None:
    """Zeros at the end of a prompt look like padding; both widths of ids."""
    table = TokenTable.from_lists(drawn.rows, vocabulary_size)
    check(drawn, sort_rows(table, np.array(drawn.tenants, np.int64)))


@given(drawn_rows(num_tenants=3), st.integers(1, 200), st.sampled_from([1, 16, 64]))
def test_neither_memory_nor_chunks_change_the_order(
    drawn: Drawn, sort_bytes: int, chunk_bytes: int
) -> None:
    table = TokenTable.from_lists(drawn.rows, 2**16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_table, "CHUNK_BYTES", chunk_bytes)
        check(drawn, sort_rows(table, np.array(drawn.tenants, np.int64), sort_bytes))


@given(st.integers(2, 200), st.integers(0, 70), st.randoms(use_true_random=False))
def test_long_shared_beginnings_are_compared_to_their_end(
    num_rows: int, depth: int, random: object
) -> None:
    choose = random.randrange  # type: ignore[attr-defined]
    rows = [(7,) * choose(depth + 1) + (choose(3),) * choose(4) for _ in range(num_rows)]
    drawn = Drawn(rows, [0] * num_rows)
    tenant = np.zeros(num_rows, np.int64)
    for sort_bytes in (1 << 30, 256):
        check(drawn, sort_rows(drawn.table, tenant, sort_bytes))


@given(drawn_rows(), st.sampled_from([2**16, 2**16 + 1]))
def test_a_table_in_a_file_is_the_table(drawn: Drawn, vocabulary_size: int) -> None:
    dtype = narrowest_dtype(vocabulary_size)
    file = TokenFile(TemporaryFile(), dtype)
    for row in drawn.rows:
        file.append(np.array(row, np.uint32), np.array([len(row)]))
    table = file.finish()
    assert [tuple(table[i].tolist()) for i in range(len(table))] == drawn.rows
    check(drawn, sort_rows(table, np.array(drawn.tenants, np.int64), 64))


def test_words_of_a_file_are_those_in_memory() -> None:
    rows = [[1, 2, 3], [], [4, 5, 6, 7, 8]]
    file = TokenFile(TemporaryFile(), narrowest_dtype(100))
    file.append(np.array([1, 2, 3], np.uint32), np.array([3, 0]))
    file.append(np.array([4, 5, 6, 7, 8], np.uint32), np.array([5]))
    mapped, kept = file.finish(), TokenTable.from_lists(rows, 100)
    assert mapped.read_words(1, 3).tolist() == kept.read_words(1, 3).tolist()
    assert [mapped[i].tolist() for i in range(3)] == rows


@pytest.mark.parametrize("period", [1, 4, 5, 80])
def test_templates_that_take_turns_do_not_end_up_in_one_partition(
    period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: every n-th row as the sample, which then knows one template of them."""
    rows = [[100 + row % period] * 6 + [row] * 6 for row in range(8000)]
    table = TokenTable.from_lists(rows)
    size, largest = table.flat.nbytes, 0
    read = sorting._read

    def spy(*arguments: object) -> object:
        nonlocal largest
        block = read(*arguments)  # type: ignore[arg-type]
        largest = max(largest, block.words.nbytes)
        return block

    monkeypatch.setattr(sorting, "_read", spy)
    monkeypatch.setattr(token_table, "CHUNK_BYTES", 4096)
    sort_rows(table, np.zeros(len(rows), np.int64), size // 5)
    assert largest < size // 4
