"""The Triton programs against the slow oracle, on the CPU under triton's interpreter.

Not collected by name: `test_triton_kernel` runs this file in a process of its own with
`TRITON_INTERPRET=1`, since triton decides at its first import whether it interprets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from benchmarks.gpu.interpreted import interpret_quickly
from pipeline.engine.backend import Backend
from pipeline.engine.base import RunControl
from pipeline.engine.forward import TransformersForward
from pipeline.engine.kernels import triton_kernel
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.triton_kernel import DeviceWork, TritonKernel, attend, upload
from pipeline.engine.kernels.work_items import WorkShape, plan_work
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.attention_cases import (
    Layer,
    Tree,
    build_tree,
    random_layer,
    rules,
    trees,
    trees_with_documents,
)
from tests.sweeps import diagonal

# Triton 3.6's interpreter makes numbers of arrays of one element, which numpy 2.3 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS = ((2, 2), (6, 2), (8, 1))  # 1, 3 and 8 query heads of a KV head
# Four rows below two nodes, one of them in the middle of its own prefill; a row that stands alone.
FOREST = build_tree(
    [(0, 40, 0), (1, 20, 3), (2, 5, 1), (2, 9, 4), (1, 7, 1), (0, 18, 1)], [3, 0, 5, 1, 4, 2]
)

_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot_bfloat16_as_float32(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """triton 3.9 interprets a product of bfloat16 as one of the integers that it keeps them in."""
    return _create_dot(
        self, *(_to_float32(x) if x.dtype == tl.bfloat16 else x for x in (a, b)), *rest
    )


def _to_float32(x: Any) -> Any:
    wide = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


interpret_quickly()
interpreter.InterpreterBuilder.create_dot = _dot_bfloat16_as_float32
triton_kernel._KEY_BLOCK_BYTES = 1  # blocks of the fewest keys, 16, so that small items need many


def assert_equals_reference(
    tree: Tree, layer: Layer, work: DeviceWork, layer_rules: AttentionRules
) -> None:
    out = attend(layer.query, layer.keys, layer.values, work, layer_rules)
    expected = attend_reference(
        layer.query, layer.keys, layer.values, torch.from_numpy(tree.positions),
        tree.spans, layer_rules, tree.owner,
    )  # fmt: skip
    assert out.dtype == expected.dtype and out.is_contiguous()
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@given(st.data(), trees(max_length=40), st.sampled_from(HEADS), st.sampled_from([4, 16, 64]))
@settings(max_examples=15, deadline=None)
def test_any_tree_equals_the_reference(
    data: st.DataObject, tree: Tree, heads: tuple[int, int], split_keys: int
) -> None:
    layer_rules = data.draw(rules(heads[0]))
    layer = random_layer(tree, heads, head_dim=16)
    block_m = data.draw(st.sampled_from([16, 32]))
    plan = plan_work(tree.spans, tree.positions, heads[0] // heads[1], block_m, split_keys)
    assert_equals_reference(tree, layer, upload(plan, CPU), layer_rules)


@given(st.data(), trees_with_documents(), st.sampled_from(HEADS), st.sampled_from([8, 16, 64]))
@settings(max_examples=15, deadline=None)
def test_views_of_any_documents_equal_the_reference(
    data: st.DataObject, tree: Tree, heads: tuple[int, int], split_keys: int
) -> None:
    layer_rules = data.draw(rules(heads[0]))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    layer = random_layer(tree, heads, 16, dtype)
    rep, block_m = heads[0] // heads[1], data.draw(st.sampled_from([16, 32]))
    plan = plan_work(tree.spans, tree.positions, rep, block_m, split_keys, tree.owner)
    assert_equals_reference(tree, layer, upload(plan, CPU), layer_rules)


@pytest.mark.parametrize(("head_dim", "dtype"), diagonal((64, 80, 128), tuple(TOLERANCE)))
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    layer = random_layer(FOREST, (6, 2), head_dim, dtype)
    layer_rules = AttentionRules(head_dim**-0.5, window=25, softcap=5.0, sinks=torch.randn(6))
    plan = plan_work(FOREST.spans, FOREST.positions, rep=3, block_m=32, split_keys=32)
    assert plan.shape.large and plan.shape.small, "both sizes of tiles are to be tried"
    assert_equals_reference(FOREST, layer, upload(plan, CPU), layer_rules)


def test_the_engine_on_this_kernel_gives_the_tokens_of_the_plain_model() -> None:
    loaded = tiny.load_tiny()
    shared = list(range(20, 50))
    prompts = [[*shared, 5, 6], [*shared, 7], [*shared[:9], 8, 9, 10], [11, 12], [*shared, 5]]
    params = SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=3, temperature=0.8)
    plan = tiny.plan_of(prompts, params, [0, 1, 0, 1, 0])
    forward = TransformersForward(loaded.model, pack_weights=False)
    kernel = TritonKernel(4, 2, CPU)
    backend = Backend(forward, kernel, recordable=kernel)
    engine = PrefixEngine(loaded, EngineSettings(max_batch_tokens=24), backend)
    ours, plain = (
        {c.sequence: c.token_ids for c in e.generate(plan, np.arange(5), RunControl())}
        for e in (engine, NaiveEngine(loaded))
    )
    assert ours == plain and len(set(ours.values())) > 2


def test_padding_changes_nothing_and_is_zero() -> None:
    """A plan in a larger shape, in memory that still holds another plan, as in a CUDA graph."""
    layer = random_layer(FOREST, (6, 2), head_dim=16)
    shape = WorkShape(tokens=24, large=20, small=40, partials=200)
    flat = torch.full((sum(shape.lengths),), 10**9)
    work = DeviceWork.view(flat, shape, block_m=32, rep=3)
    query = torch.full((24, 6, 16), float("nan"))
    query[: len(FOREST.positions)] = layer.query
    layer_rules = AttentionRules(0.3, sinks=torch.randn(6))
    for split_keys in (8, 16):
        plan = plan_work(FOREST.spans, FOREST.positions, 3, 32, split_keys)
        flat.copy_(torch.from_numpy(plan.flatten(shape)))
        out = attend(query, layer.keys, layer.values, work, layer_rules)
        exact = attend(layer.query, layer.keys, layer.values, upload(plan, CPU), layer_rules)
        assert torch.equal(out[: len(exact)], exact)
        assert not out[len(exact) :].any()


@pytest.mark.parametrize("sinks", [None, torch.zeros(2)])
def test_a_query_that_sees_nothing_gives_zeros(sinks: torch.Tensor | None) -> None:
    """One without spans, one whose only span lies in its future or before its window."""
    tree = Tree(np.array([[0, 1, 1, 9, 6], [1, 2, 1, 9, 0]]), np.array([5, 50, 0]), capacity=10)
    layer = random_layer(tree, (2, 1), head_dim=16)
    work = upload(plan_work(tree.spans, tree.positions, 2, 16, 64), CPU)
    layer_rules = AttentionRules(0.3, window=4, sinks=sinks)
    assert not attend(layer.query, layer.keys, layer.values, work, layer_rules).any()
    assert_equals_reference(tree, layer, work, layer_rules)
