"""The plan and its summary against brute force."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.frames import plan_frame, tree_frame
from pipeline.plan.peak import KVNeeds
from pipeline.plan.plan import Plan, build_plan, noise_key
from pipeline.plan.summary import KVLimits, depth_histogram, hash_plan, summarise
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams
from tests.plan.edges import edge_token_ids
from tests.plan.trie_oracle import Drawn, drawn_rows

PARAMS = (
    SamplingParams(max_new_tokens=3),
    SamplingParams(max_new_tokens=5),
    SamplingParams(max_new_tokens=3, temperature=1.0),
)


def ids_of(drawn: Drawn) -> list[str]:
    return [f"row-{i}" for i in range(len(drawn.rows))]


def make_plan(drawn: Drawn, params: list[int], min_prefix_tokens: int = 2) -> Plan:
    chosen = np.array([params[i % len(params)] for i in range(len(drawn.rows))], np.int64)
    tenant = np.array(drawn.tenants, np.int64)
    return build_plan(drawn.table, ids_of(drawn), PARAMS, chosen, tenant, min_prefix_tokens)


params_strategy = st.lists(st.integers(0, len(PARAMS) - 1), min_size=1, max_size=3)


@given(drawn_rows(), params_strategy)
def test_reuse_depth_is_the_longest_prefix_shared_with_another_row(
    drawn: Drawn, params: list[int]
) -> None:
    assert make_plan(drawn, params).reuse_depth.tolist() == drawn.reuse_depths()


@given(drawn_rows(), params_strategy)
def test_only_greedy_rows_with_equal_prompt_and_parameters_share_a_sequence(
    drawn: Drawn, params: list[int]
) -> None:
    plan = make_plan(drawn, params)
    expected: dict[object, list[int]] = {}
    for row, ids in enumerate(drawn.rows):
        chosen = params[row % len(params)]
        own = None if PARAMS[chosen].is_greedy else row
        if ids:
            expected.setdefault((drawn.tenants[row], ids, chosen, own), []).append(row)
    found = [np.flatnonzero(plan.sequence_of_row == s).tolist() for s in range(len(plan.sequences))]
    assert sorted(found) == sorted(expected.values())
    assert [rows[0] for rows in found] == plan.sequences.row.tolist()
    assert (plan.sequence_of_row >= 0).tolist() == [bool(ids) for ids in drawn.rows]


@given(drawn_rows(), params_strategy)
def test_sequences_run_in_tree_order(drawn: Drawn, params: list[int]) -> None:
    plan = make_plan(drawn, params)
    assert (np.diff(plan.sequences.prompt) >= 0).all()
    for node in range(plan.tree.num_nodes):
        below = range(int(plan.sequence_lo[node]), int(plan.sequence_hi[node]))
        prompts = range(int(plan.tree.prompt_lo[node]), int(plan.tree.prompt_hi[node]))
        assert {int(plan.sequences.prompt[s]) for s in below} == set(prompts)


@given(drawn_rows(), params_strategy, st.integers(1, 4))
def test_groups_are_shared_long_enough_and_closed_upwards(
    drawn: Drawn, params: list[int], least: int
) -> None:
    plan = make_plan(drawn, params, least)
    for node in range(plan.tree.num_nodes):
        above = [n for n in plan.tree.path(node)[:-1] if plan.is_group[n]]
        covered = int(plan.tree.end[above[-1]]) if above else 0
        span = int(plan.tree.end[node]) - covered
        shared = int(plan.sequence_hi[node] - plan.sequence_lo[node]) > 1
        assert plan.anchor_end[node] == covered
        assert bool(plan.is_group[node]) is (shared and span >= least)


@given(drawn_rows(), params_strategy)
def test_the_group_of_a_row_is_the_deepest_on_its_path(drawn: Drawn, params: list[int]) -> None:
    plan = make_plan(drawn, params)
    for row, sequence in enumerate(plan.sequence_of_row.tolist()):
        groups = [-1]
        if sequence >= 0:
            terminal = int(plan.tree.terminal[plan.sequences.prompt[sequence]])
            groups += [n for n in plan.tree.path(terminal) if plan.is_group[n]]
        assert plan.group_of_row[row] == groups[-1]


@given(drawn_rows(), params_strategy)
def test_edge_token_ids_spell_the_prompts(drawn: Drawn, params: list[int]) -> None:
    plan = make_plan(drawn, params)
    for sequence in range(len(plan.sequences)):
        path = plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequence]]))
        spelt = np.concatenate([edge_token_ids(plan, node) for node in path])
        assert spelt.tolist() == plan.prompt_token_ids(sequence).tolist()


@pytest.mark.fault(
    "two tenants, one prefix",
    injected="random trees of three tenants",
    outcome="no node has rows of two",
)
@given(drawn_rows(num_tenants=3))
def test_two_tenants_never_share(drawn: Drawn) -> None:
    alone = Drawn([(7, 7, 7, 7)] * len(drawn.rows), list(range(len(drawn.rows))))
    plan = make_plan(alone, [0])
    assert not plan.reuse_depth.any() and not plan.is_group.any()
    assert plan.tree.unique_tokens == 4 * len(drawn.rows)


@given(drawn_rows(), params_strategy, st.integers(1, 6))
def test_peak_kv_is_the_worst_window(drawn: Drawn, params: list[int], max_rows: int) -> None:
    plan = make_plan(drawn, params)
    num = len(plan.sequences)
    width = min(max_rows, num)
    worst = 0
    for start in range(num - width + 1 if num else 0):
        window = range(start, start + width)
        alive = set()
        tokens = 0
        for sequence in window:
            terminal = int(plan.tree.terminal[plan.sequences.prompt[sequence]])
            groups = [n for n in plan.tree.path(terminal) if plan.is_group[n]]
            alive.update(groups)
            covered = int(plan.tree.end[groups[-1]]) if groups else 0
            tokens += int(plan.prompt_lengths[sequence]) - covered
            tokens += int(plan.max_new_tokens[sequence])
        tokens += sum(int(plan.tree.end[n] - plan.anchor_end[n]) for n in alive)
        worst = max(worst, tokens)
    assert KVNeeds.of(plan).peak(max_rows) == worst


@given(drawn_rows(), params_strategy)
def test_the_summary_adds_up(drawn: Drawn, params: list[int]) -> None:
    plan = make_plan(drawn, params)
    summary = summarise(plan, ids_of(drawn), KVLimits(10, 4, 100))
    total = sum(len(row) for row in drawn.rows)
    assert (summary.prompt_tokens, summary.rows) == (total, len(drawn.rows))
    assert summary.unique_tokens == len(drawn.rows_by_prefix())
    runs = summary.rows - summary.rows_rejected
    assert runs == sum(1 for row in drawn.rows if row)
    assert sum(b["rows"] for b in summary.depth_histogram) == runs
    in_groups = pl.Series(plan.group_of_row).filter(pl.Series(plan.group_of_row >= 0))
    assert summary.singletons + len(in_groups) == runs
    assert summary.groups == in_groups.n_unique()
    sizes = [group["rows"] for group in summary.largest_groups]
    assert sizes == sorted(sizes, reverse=True)
    assert summary.peak_kv_bytes is not None and summary.peak_kv_bytes <= 100


@given(drawn_rows(), params_strategy)
def test_the_plan_table_has_every_row_once_and_in_order(drawn: Drawn, params: list[int]) -> None:
    plan = make_plan(drawn, params)
    frame = plan_frame(plan, ids_of(drawn))
    assert sorted(frame["row_index"].to_list()) == list(range(len(drawn.rows)))
    sequences = frame["sequence"].to_list()
    known = [s for s in sequences if s is not None]
    assert known == sorted(known) and sequences[: len(known)] == known
    for row in frame.iter_rows(named=True):
        assert row["id"] == f"row-{row['row_index']}"
        assert row["prompt_tokens"] == len(drawn.rows[row["row_index"]])
        first = None if row["sequence"] is None else int(plan.sequences.row[row["sequence"]])
        copied = first not in (None, row["row_index"])
        assert row["dedup_of"] == (f"row-{first}" if copied else None)


@given(drawn_rows())
def test_the_tree_table_counts_the_rows_below(drawn: Drawn) -> None:
    plan = make_plan(drawn, [0])
    shared = drawn.rows_by_prefix()
    for node, rows in tree_frame(plan).select("node", "rows").iter_rows():
        row = int(plan.tree.row_of_prompt[plan.tree.prompt_lo[node]])
        prefix = drawn.rows[row][: int(plan.tree.end[node])]
        assert rows == len(shared[drawn.tenants[row], prefix])


def test_depths_are_counted_in_powers_of_two() -> None:
    bins = depth_histogram(np.array([0, 0, 1, 3, 4, 7, 8]))
    assert [(b["from"], b["to"], b["rows"]) for b in bins] == [
        (0, 1, 2), (1, 2, 1), (2, 4, 1), (4, 8, 2), (8, 16, 1)
    ]  # fmt: skip


def test_the_hash_follows_whatever_changes_an_answer() -> None:
    def hashed(rows: list[list[int]], params: SamplingParams, ids: list[str]) -> str:
        table = TokenTable.from_lists(rows)
        plan = build_plan(table, ids, (params,), np.zeros(len(rows), np.int64))
        return hash_plan(plan, ids)

    greedy = SamplingParams()
    base = hashed([[1, 2], [1, 3]], greedy, ["a", "b"])
    assert base == hashed([[1, 2], [1, 3]], greedy, ["a", "b"])
    others = {
        hashed([[1, 2], [1, 4]], greedy, ["a", "b"]),
        hashed([[1, 2], [1, 3]], SamplingParams(max_new_tokens=7), ["a", "b"]),
        hashed([[1, 2], [1, 3]], greedy, ["a", "c"]),
        hashed([[1], [2, 1, 3]], greedy, ["a", "b"]),
    }
    assert len(others | {base}) == 5


def test_noise_depends_on_seed_and_id_alone() -> None:
    assert noise_key(0, "a") == noise_key(0, "a")
    assert len({noise_key(0, "a"), noise_key(1, "a"), noise_key(0, "b")}) == 3
