"""Work items say exactly what the spans say, whatever the cut; no kernel runs here."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.kernels.rules import attend_reference
from pipeline.engine.kernels.work_items import (
    ITEM_FIELDS,
    SMALL_ROWS,
    WorkItems,
    WorkShape,
    choose_split_keys,
    plan_work,
)
from tests.engine.attention_cases import (
    Tree,
    random_layer,
    rules,
    trees,
    trees_with_documents,
)

PLANS = st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([8, 16, 64]), st.integers(1, 40))
NOTHING = Tree(np.zeros((0, 5), np.int64), np.array([3, 4]), capacity=1)


def all_items(work: WorkItems) -> np.ndarray:
    return np.concatenate([work.large, work.small])


@given(st.data(), st.one_of(trees(), trees_with_documents()), PLANS)
@settings(max_examples=100, deadline=None)
def test_items_mean_what_the_spans_mean(
    data: st.DataObject, tree: Tree, plan: tuple[int, int, int]
) -> None:
    """The first five fields of an item are a span again, so the oracle can read both."""
    rep, block_m, split_keys = plan
    layer, layer_rules = random_layer(tree, (2, 1), head_dim=4), data.draw(rules(2))
    items = all_items(plan_work(tree.spans, tree.positions, rep, block_m, split_keys, tree.owner))
    positions = torch.from_numpy(tree.positions)
    by_item, by_span = (
        attend_reference(
            layer.query, layer.keys, layer.values, positions, s, layer_rules, tree.owner
        )
        for s in (items[:, :5], tree.spans)
    )
    torch.testing.assert_close(by_item, by_span, rtol=1e-5, atol=1e-5)


TREES = st.one_of(trees(max_nodes=9, max_length=60), trees_with_documents())


@given(TREES, PLANS)
@settings(max_examples=200, deadline=None)
def test_items_keep_their_size_and_partials_their_token(
    tree: Tree, plan: tuple[int, int, int]
) -> None:
    rep, block_m, split_keys = plan
    work = plan_work(tree.spans, tree.positions, rep, block_m, split_keys, tree.owner)
    owner = np.arange(len(tree.positions)) if tree.owner is None else tree.owner
    items = all_items(work)
    tokens, keys = items[:, 1] - items[:, 0], items[:, 3] - items[:, 2]
    assert ((tokens > 0) & (tokens * rep <= block_m)).all()
    assert ((keys > 0) & (keys <= split_keys)).all()
    assert ((work.small[:, 1] - work.small[:, 0]) * rep <= SMALL_ROWS).all()
    token_of_partial = {
        part + query - low: owner[query]
        for low, high, _, _, _, part in items.tolist()
        for query in range(low, high)
    }
    assert sorted(work.partials.tolist()) == sorted(token_of_partial) == list(range(tokens.sum()))
    assert work.shape.tokens == max(owner) + 1 and work.shape.queries == len(owner)
    for token in range(work.shape.tokens):
        listed = work.partials[work.offsets[token] : work.offsets[token + 1]].tolist()
        assert all(token_of_partial[part] == token for part in listed)


def test_no_spans_make_no_items() -> None:
    work = plan_work(NOTHING.spans, NOTHING.positions, rep=2, block_m=16, split_keys=8)
    assert work.shape == WorkShape(tokens=2, large=0, small=0, partials=0)
    assert work.offsets.tolist() == [0, 0, 0]


def test_a_causal_piece_has_no_items_in_its_own_future() -> None:
    """64 tokens of one prompt: of the 4 x 4 tiles only those on and below the diagonal are work."""
    spans = np.array([[0, 64, 0, 64, 100]])
    work = plan_work(spans, np.arange(100, 164), rep=1, block_m=16, split_keys=16)
    assert work.shape.small == 10


def test_a_long_prefix_is_spread_and_a_full_card_is_not_cut() -> None:
    """One row over 16K keys becomes many items; 2,000 rows over 300 keys stay whole."""
    alone = np.array([[0, 1, 0, 16384, 0]])
    keys = choose_split_keys(alone, rep=4, block_m=64, kv_heads=8, programs=512)
    assert len(all_items(plan_work(alone, np.array([16383]), 4, 64, keys))) == 64
    rows = np.arange(2000)
    many = np.stack([rows, rows + 1, rows * 300, rows * 300 + 300, rows * 0], 1)
    keys = choose_split_keys(many, rep=4, block_m=64, kv_heads=8, programs=512)
    assert len(all_items(plan_work(many, rows * 0 + 299, 4, 64, keys))) == 2000


def test_a_plan_that_does_not_fit_the_shape_is_refused() -> None:
    work = plan_work(np.array([[0, 1, 0, 9, 0]]), np.array([8]), rep=1, block_m=16, split_keys=4)
    assert len(work.flatten(work.shape)) == 3 * ITEM_FIELDS + 2 + 4 + 2
    with pytest.raises(AssertionError, match="does not fit"):
        work.flatten(WorkShape(tokens=1, large=0, small=2, partials=3))


def test_no_token_is_added_before_views() -> None:
    """A recorded step is padded by tokens; views behind them would be others' queries."""
    spans, owner = np.array([[2, 4, 0, 9, 0]]), np.array([0, 1, 1, 0])
    work = plan_work(spans, np.array([20, 21, 9, 8]), 1, 16, 16, owner)
    assert work.shape == WorkShape(tokens=2, large=0, small=1, partials=2, views=2)
    assert work.offsets.tolist() == [0, 1, 2] and work.partials.tolist() == [1, 0]
    longer = WorkShape(tokens=2, large=1, small=4, partials=7, views=3)
    assert work.flatten(longer)[-6:].tolist() == [20, 21, 9, 8, 0, 0]
    with pytest.raises(AssertionError, match="does not fit"):
        work.flatten(WorkShape(tokens=3, large=1, small=4, partials=7, views=3))


def test_planning_thousands_of_spans_takes_less_than_a_millisecond() -> None:
    """Best of 20, so that other load on the machine does not count; measured 0.3 ms."""
    rows, groups = np.arange(4096), np.arange(800)
    own = np.stack([rows, rows + 1, rows * 300, rows * 300 + 150, rows * 0 + 2000], 1)
    queries, slots = groups * 5, groups * 2000
    shared = np.stack([queries, queries + 5, slots, slots + 2000, groups * 0], 1)
    spans, positions = np.concatenate([shared, own]), np.full(4096, 2149)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        plan_work(spans, positions, rep=4, block_m=64, split_keys=4096)
        best = min(best, time.perf_counter() - begin)
    assert best < 1e-3
