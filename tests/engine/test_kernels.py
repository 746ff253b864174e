"""Every kernel against an oracle that looks up each query's own path, key by key."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.engine.kernels import native, partial
from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.native_kernel import NativeKernel, cut_tiles
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kernels.torch_levels import levels_of_views
from pipeline.engine.packing import Packer, Piece, PlacedSlots, pack_prefill, shared_spans
from pipeline.engine.rotary import Rotary
from pipeline.engine.views import Views
from tests.engine.attention_cases import (
    Layer,
    Tree,
    random_layer,
    trees,
    trees_with_documents,
    with_views,
)
from tests.engine.attention_cases import rules as random_rules

CPU = torch.device("cpu")


@dataclass
class Forest:
    """Pieces over random ranges, and for each query the slots that it may see, in order.

    All slots are below `capacity`.
    """

    pieces: list[Piece] = field(default_factory=list)
    slots_of_query: list[list[int]] = field(default_factory=list)
    capacity: int = 0


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """A few nested shared ranges; below each, pieces that continue them."""
    forest, used = Forest(), 0

    def take(length: int, position: int) -> PlacedSlots:
        nonlocal used
        used += length + draw(st.integers(0, 3))
        return PlacedSlots(used - length, used, position)

    def grow(above: tuple[PlacedSlots, ...], depth: int, position: int) -> None:
        for _ in range(draw(st.integers(1, 3))):
            if depth < 3 and draw(st.booleans()):
                length = draw(st.integers(1, 300))
                grow((*above, take(length, position)), depth + 1, position + length)
                continue
            past, new = draw(st.integers(0, 80)), draw(st.sampled_from([1, 1, 2, 5, 33, 70]))
            low = take(past + new, position).low
            ids = np.zeros(new, np.int64)
            forest.pieces.append(Piece(ids, position + past, low + past, past, above))
            path = [slot for placed in above for slot in range(placed.low, placed.high)]
            for i in range(new):
                forest.slots_of_query.append(path + list(range(low, low + past + i + 1)))

    grow((), 0, 0)
    forest.capacity = used
    return forest


def by_path(
    query: Tensor, keys: Tensor, values: Tensor, forest: Forest, rules: AttentionRules
) -> Tensor:
    """[N, Hq, d] float64, one query and head at a time."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    rep = query.shape[1] // keys.shape[0]
    for i, slots in enumerate(forest.slots_of_query):
        seen = slots[-rules.window :] if rules.window else slots
        for head in range(query.shape[1]):
            scores = keys[head // rep, seen].double() @ query[i, head].double() * rules.scale
            if rules.softcap:
                scores = rules.softcap * torch.tanh(scores / rules.softcap)
            if rules.sinks is not None:
                scores = torch.cat([scores, rules.sinks[head : head + 1].double()])
            weights = torch.softmax(scores, 0)[: len(seen)]
            out[i, head] = weights @ values[head // rep, seen].double()
    return out


def kernels(num_heads: int, num_kv_heads: int) -> list[AttentionKernel]:
    found: list[AttentionKernel] = [TorchKernel(CPU)]
    if native.why_unavailable() is None:
        found += [NativeKernel(num_heads, num_kv_heads, way) for way in native.ways_of_bfloat16()]
    return found


RULES = [
    AttentionRules(0.3),
    AttentionRules(0.3, window=40),
    AttentionRules(0.3, softcap=2.0),
    AttentionRules(0.3, window=7, softcap=5.0, sinks=torch.linspace(-1.0, 2.0, 6)),
]


@given(forests(), st.sampled_from(RULES), st.sampled_from([16, 48, 64]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_kernels_equal_the_oracle(
    forest: Forest, rules: AttentionRules, head_dim: int, is_bfloat16: bool
) -> None:
    """Heads of 64 take the way of few rows as well, where a piece is one token long.

    Seen red: no shrink of the running result, a window off by one, a tile's border ignored; with
    few rows lanes summed wrongly, the last key of a block left out, one row's weights for all.
    """
    torch.manual_seed(len(forest.slots_of_query))
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    tokens = len(forest.slots_of_query)
    query = torch.randn(tokens, 6, head_dim).to(dtype)
    keys, values = (torch.randn(2, forest.capacity, head_dim).to(dtype) for _ in range(2))
    expected = by_path(query, keys, values, forest, rules)
    tolerance = 6e-2 if is_bfloat16 else 2e-5
    for kernel in kernels(6, 2):
        nothing = np.zeros(0, np.int64)
        batch = pack_prefill(forest.pieces, (nothing, nothing), Packer(kernel, CPU))
        out = kernel.attend(query, keys, values, batch.work, rules)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [48, 64])
def test_keys_and_values_of_bfloat16_may_be_of_any_size(head_dim: int) -> None:
    """Beyond half precision in both directions, with a channel a thousand times the others."""
    torch.manual_seed(0)
    tokens = 300
    query = torch.randn(tokens, 6, head_dim) * 1e-9
    keys, values = (torch.randn(2, tokens, head_dim) for _ in range(2))
    keys *= 1e9
    keys[..., 5] *= 1000
    query[..., 5] /= 1000
    values[0] *= 1e-12
    values[1] *= 1e12
    layer = Layer(*(x.bfloat16() for x in (query, keys, values)))
    positions = np.arange(tokens)
    spans = np.array([[0, tokens, 0, tokens, 0]])
    rules = AttentionRules(0.3)
    exact = layer.query.double(), layer.keys.double(), layer.values.double()
    expected = attend_reference(*exact, torch.from_numpy(positions), spans, rules)
    for kernel in kernels(6, 2):
        work = kernel.prepare(spans, positions)
        out = kernel.attend(layer.query, layer.keys, layer.values, work, rules)
        error = (out.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < 2e-2, kernel.name


def attend(kernel: AttentionKernel, tree: Tree, layer: Layer, rules: AttentionRules) -> Tensor:
    work = kernel.prepare(tree.spans, tree.positions, tree.owner)
    return kernel.attend(layer.query, layer.keys, layer.values, work, rules)


def by_reference(tree: Tree, layer: Layer, rules: AttentionRules) -> Tensor:
    positions = torch.from_numpy(tree.positions)
    arena = layer.keys, layer.values
    return attend_reference(layer.query, *arena, positions, tree.spans, rules, tree.owner)


@given(
    st.data(),
    trees_with_documents(max_length=90),
    st.sampled_from([(3, 3), (6, 2), (8, 1)]),
    st.sampled_from([16, 48, 64]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_kernels_join_the_views_of_a_token_as_the_reference_does(
    data: st.DataObject, tree: Tree, heads: tuple[int, int], head_dim: int, is_bfloat16: bool
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    layer = random_layer(tree, heads, head_dim, dtype)
    layer_rules = data.draw(random_rules(heads[0]))
    expected = by_reference(tree, layer, layer_rules)
    tolerance = 6e-2 if is_bfloat16 else 2e-5
    for kernel in kernels(*heads):
        out = attend(kernel, tree, layer, layer_rules)
        assert out.dtype == dtype and out.is_contiguous(), kernel.name
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@given(st.data(), trees(max_length=90), st.booleans())
@settings(max_examples=60, deadline=None)
def test_views_from_where_their_tokens_stand_change_nothing(
    data: st.DataObject, tree: Tree, is_bfloat16: bool
) -> None:
    """Whichever spans of a tree are seen by views instead of by the tokens' own queries."""
    is_moved = data.draw(
        st.lists(st.booleans(), min_size=len(tree.spans), max_size=len(tree.spans))
    )
    viewed = with_views(tree, np.array(is_moved, bool))
    assert viewed.owner is not None
    layer = random_layer(tree, (6, 2), 64, torch.bfloat16 if is_bfloat16 else torch.float32)
    turned = Layer(layer.query[torch.from_numpy(viewed.owner)], layer.keys, layer.values)
    layer_rules = data.draw(random_rules(6))
    expected = by_reference(tree, layer, layer_rules)
    again = by_reference(viewed, turned, layer_rules)
    tolerance = 6e-2 if is_bfloat16 else 2e-5
    torch.testing.assert_close(again, expected, atol=tolerance, rtol=tolerance)
    for kernel in kernels(6, 2):
        out = attend(kernel, viewed, turned, layer_rules)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@given(trees_with_documents())
@settings(max_examples=100, deadline=None)
def test_no_query_is_twice_in_a_level(tree: Tree) -> None:
    """What a level gives is merged at once: of two results of a query one would be lost."""
    for level in levels_of_views(tree.spans, tree.positions, CPU):
        queries = [np.arange(*span[:2]) for span in level.singles]
        queries += [bucket.target.numpy() for bucket in level.buckets]
        assert np.bincount(np.concatenate(queries)).max() == 1


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("sinks", [None, torch.zeros(6)])
def test_a_token_whose_views_see_nothing_is_zeros(window: int, sinks: Tensor | None) -> None:
    """Views before a document, or beyond its window; the third token sees it by its own query."""
    spans = np.array([[2, 3, 1, 9, 3], [3, 6, 1, 9, 3]])
    positions = np.array([4, 4, 7, 2, -3, 60 if window else 1])
    tree = Tree(spans, positions, 10, np.array([0, 1, 2, 0, 1, 2]))
    layer = random_layer(tree, (6, 2), 64)
    layer_rules = AttentionRules(0.3, window=window, sinks=sinks)
    expected = by_reference(tree, layer, layer_rules)
    assert not expected[:2].any() and expected[2].all()
    for kernel in kernels(6, 2):
        out = attend(kernel, tree, layer, layer_rules)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_a_nan_in_a_document_reaches_each_token_with_a_view_of_it() -> None:
    spans = np.array([[0, 3, 1, 9, 0], [3, 5, 20, 30, 0]])
    tree = Tree(spans, np.array([7, 7, 7, 12, 15]), 30, np.array([0, 1, 2, 0, 2]))
    for broken in ("keys", "values"):
        layer = random_layer(tree, (6, 2), 64)
        getattr(layer, broken)[:, 25] = float("nan")
        for kernel in kernels(6, 2):
            is_nan = attend(kernel, tree, layer, AttentionRules(0.3)).isnan().flatten(1)
            assert is_nan.all(1).tolist() == [True, False, True], kernel.name
            assert not is_nan[1].any(), kernel.name


def test_the_reference_equals_the_oracle() -> None:
    piece = Piece(np.zeros(3, np.int64), 7, 20, 2, (PlacedSlots(2, 7, 0),))
    path = [2, 3, 4, 5, 6, 18, 19]
    forest = Forest([piece], [[*path, *range(20, 21 + i)] for i in range(3)])
    spans = np.array([[0, 3, 2, 7, 0], [0, 3, 18, 23, 5]])
    query, keys, values = (torch.randn(*shape) for shape in ((3, 6, 8), (2, 30, 8), (2, 30, 8)))
    for rules in RULES:
        out = attend_reference(query, keys, values, torch.tensor([7, 8, 9]), spans, rules)
        expected = by_path(query, keys, values, forest, rules)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_a_kernel_does_not_hide_a_nan(tokens: int, head_dim: int) -> None:
    """A broken number must reach the check of the logits, whatever computes attention."""
    keys, values = torch.randn(2, 40, head_dim), torch.randn(2, 40, head_dim)
    keys[:, 5] = float("nan")
    piece = Piece(np.zeros(tokens, np.int64), 8, 20, 0, (PlacedSlots(0, 8, 0),))
    nothing = np.zeros(0, np.int64)
    for kernel in kernels(4, 2):
        batch = pack_prefill([piece], (nothing, nothing), Packer(kernel, CPU))
        rules = AttentionRules(0.3)
        out = kernel.attend(torch.randn(tokens, 4, head_dim), keys, values, batch.work, rules)
        assert out.isnan().all(), kernel.name


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), max_size=30), st.integers(1, 100)
)
@settings(max_examples=200, deadline=None)
def test_tiles_hold_every_query_of_every_span_once(
    drawn: list[tuple[int, int]], tile_tokens: int
) -> None:
    spans = [[lo, lo + n, 10 * i, 10 * i + 10, 0] for i, (lo, n) in enumerate(drawn)]
    table = np.array(spans, np.int64).reshape(-1, 5)
    cut, tiles = cut_tiles(table, 150, tile_tokens)
    served = {
        (query, int(row[2]))
        for q_lo, q_hi, low, high in tiles.tolist()
        for row in cut[low:high]
        for query in range(max(q_lo, int(row[0])), min(q_hi, int(row[1])))
    }
    assert served == {(q, s[2]) for s in spans for q in range(s[0], s[1])}
    assert int((cut[:, 1] - cut[:, 0]).sum()) == sum(n for _, n in drawn)
    assert tiles[:, 0].tolist() == list(range(0, 150, tile_tokens)) and tiles[-1, 1] == 150


def test_spans_of_the_same_queries_that_go_on_are_one_of_a_tile() -> None:
    """Not where a slot or a position is missing between, nor where only some queries see both."""
    chain = [[0, 40, 0, 10, 0], [0, 40, 30, 40, 99], [0, 40, 10, 25, 10], [0, 30, 25, 30, 25]]
    cut, tiles = cut_tiles(np.array(chain), 40, 16)
    assert cut.tolist() == [
        [0, 16, 0, 30, 0], [0, 16, 30, 40, 99],
        [16, 30, 25, 30, 25], [16, 32, 0, 25, 0], [16, 32, 30, 40, 99],
        [32, 40, 0, 25, 0], [32, 40, 30, 40, 99],
    ]  # fmt: skip
    assert tiles.tolist() == [[0, 16, 0, 2], [16, 32, 2, 5], [32, 40, 5, 7]]


def test_neighbours_that_see_a_span_at_one_position_share_it() -> None:
    """Elsewhere in the frame, or after a gap, it is another one; positions are never counted from
    slots."""
    top, left, right = PlacedSlots(0, 10, 0), PlacedSlots(10, 14, 10), PlacedSlots(14, 20, 10)
    bounds = [(0, 1), (1, 3), (3, 4), (4, 5)]
    spans = shared_spans([(top, left), (top, left), (top, right), ()], bounds)
    assert spans.tolist() == [[0, 4, 0, 10, 0], [0, 3, 10, 14, 10], [3, 4, 14, 20, 10]]
    moved = left._replace(position=90)
    spans = shared_spans([(top, left), (top, moved), (top, moved), ()], bounds)
    assert spans.tolist() == [[0, 4, 0, 10, 0], [0, 1, 10, 14, 10], [1, 4, 10, 14, 90]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torchs_fused_kernel_equals_the_reference(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 3, n, 16, dtype=dtype) for n in (7, 33, 33))
    bias = torch.zeros(5, 1, 1, 33)
    bias[2, ..., 20:] = float("-inf")
    mask = bias if with_bias else None
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    pairs = [
        (partial.dense(q, k, v, 0.3, mask), partial.dense_reference(q, k, v, 0.3, mask)),
        (
            partial.causal(q, k[..., :7, :], v[..., :7, :], 0.3),
            partial.causal_reference(q, k[..., :7, :], v[..., :7, :], 0.3),
        ),
    ]
    for (out, lse), (expected, expected_lse) in pairs:
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-3)


def test_merged_parts_equal_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (4, 30, 30))
    whole, whole_lse = partial.dense_reference(q, k, v, 0.4, None)
    out, lse = partial.dense_reference(q, k[..., :11, :], v[..., :11, :], 0.4, None)
    partial.merge(out, lse, *partial.dense_reference(q, k[..., 11:, :], v[..., 11:, :], 0.4, None))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_argmax_is_torchs_and_sees_a_nan(dtype: torch.dtype) -> None:
    if native.why_unavailable():
        pytest.skip(str(native.why_unavailable()))
    logits = torch.randn(9, 1003).to(dtype)
    logits[2, 7] = logits[2, 900] = 9.0  # the first of equals
    logits[3, 1001] = float("nan")
    best, place = torch.ops.coppice.largest_of_rows(logits)
    expected = logits.float().max(-1)
    assert torch.equal(best.isfinite(), expected.values.isfinite()) and not best[3].isfinite()
    seen = [row for row in range(9) if row != 3]
    assert torch.equal(best[seen], expected.values[seen])
    assert torch.equal(place[seen], expected.indices[seen])


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [4, 16, 32])
def test_views_are_turned_as_by_plain_torch(dtype: torch.dtype, pairs: int) -> None:
    """Of queries that lie between keys and values, as a forward has them."""
    torch.manual_seed(0)
    query = torch.randn(7, 10, 64).to(dtype)[:, 2:8]
    owner, shift = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([5, 0, 17, 4000, 1])
    rotary = Rotary(("inv_freq",), {"inv_freq": torch.rand(pairs).double()}, False)
    views = Views(owner, shift, rotary)
    turn = views.turn_in(0)
    assert turn is not None
    made = torch.ops.coppice.turn_views(query, owner, *turn)
    torch.testing.assert_close(
        made, views.of(0, query), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
    )
