"""The tree against a dictionary of all prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.radix_tree import RadixTree, build_tree, next_smaller, previous_smaller
from pipeline.plan.sorting import sort_rows
from pipeline.plan.token_table import TokenTable
from tests.plan.trie_oracle import Drawn, count_tokens, drawn_rows


def make_tree(drawn: Drawn) -> tuple[RadixTree, TokenTable]:
    table = drawn.table
    tenant = np.array(drawn.tenants, np.int64)
    order, shared = rows = sort_rows(table, tenant)
    lengths = table.lengths[order]
    is_new = rows.is_new(lengths)
    return build_tree(lengths[is_new], shared[is_new], order[is_new]), table


@given(drawn_rows())
def test_unique_tokens_are_the_distinct_prefixes(drawn: Drawn) -> None:
    tree, _ = make_tree(drawn)
    assert tree.unique_tokens == len(drawn.rows_by_prefix())


@given(drawn_rows(num_tenants=1))
def test_a_trie_made_node_by_node_has_as_many(drawn: Drawn) -> None:
    tree, _ = make_tree(drawn)
    assert tree.unique_tokens == count_tokens(drawn.rows)


@given(drawn_rows())
def test_a_path_covers_its_prompt_without_gap_from_root_to_leaf(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    for prompt, row in enumerate(tree.row_of_prompt.tolist()):
        path = tree.path(int(tree.terminal[prompt]))
        starts, ends = tree.start[path].tolist(), tree.end[path].tolist()
        assert starts == [0, *ends[:-1]]
        assert ends[-1] == len(table[row])
        assert all(tree.prompt_lo[n] <= prompt < tree.prompt_hi[n] for n in path)


@given(drawn_rows())
def test_all_prompts_below_a_node_share_its_prefix_and_no_other_prompt_does(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    shared = drawn.rows_by_prefix()
    for node in range(tree.num_nodes):
        end = int(tree.end[node])
        below = tree.row_of_prompt[tree.prompt_lo[node] : tree.prompt_hi[node]].tolist()
        tenant = drawn.tenants[below[0]]
        prefix = drawn.rows[below[0]][:end]
        with_prefix = {(drawn.tenants[r], drawn.rows[r]) for r in shared[tenant, prefix]}
        assert {(drawn.tenants[r], drawn.rows[r]) for r in below} == with_prefix


@given(drawn_rows())
def test_parents_come_first_and_edges_are_never_empty(drawn: Drawn) -> None:
    tree, _ = make_tree(drawn)
    assert (tree.parent < np.arange(tree.num_nodes)).all()
    assert (tree.edge_lengths > 0).all()


@given(drawn_rows())
def test_siblings_begin_with_different_tokens(drawn: Drawn) -> None:
    tree, table = make_tree(drawn)
    seen = set()
    for node in range(tree.num_nodes):
        row = int(tree.row_of_prompt[tree.prompt_lo[node]])
        key = (drawn.tenants[row], int(tree.parent[node]), int(table[row][tree.start[node]]))
        assert key not in seen
        seen.add(key)


@given(st.lists(st.integers(0, 4), max_size=40))
def test_the_nearest_smaller_values_are_found(drawn: list[int]) -> None:
    values = np.array([0, *drawn], np.int64)
    before, after = previous_smaller(values), next_smaller(values)
    for i in np.flatnonzero(values).tolist():
        smaller = np.flatnonzero(values < values[i])
        assert before[i] == smaller[smaller < i].max()
        assert after[i] == smaller[smaller > i].min(initial=len(values))


def test_the_picture_of_the_module() -> None:
    rows = [(0, 1), (0, 1, 2), (0, 1, 3, 4), (9,)]
    tree, _ = make_tree(Drawn(rows, [0] * 4))
    assert tree.parent.tolist() == [-1, 0, 0, -1]
    assert list(zip(tree.start.tolist(), tree.end.tolist(), strict=True)) == [
        (0, 2), (2, 3), (2, 4), (0, 1)
    ]  # fmt: skip
    assert tree.terminal.tolist() == [0, 1, 2, 3]


def test_a_table_without_tokens_has_an_empty_tree() -> None:
    tree, _ = make_tree(Drawn([(), ()], [0, 0]))
    assert (tree.num_nodes, tree.num_prompts, tree.unique_tokens) == (0, 0, 0)
