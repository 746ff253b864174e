"""The Triton programs around attention against their slow meaning, under triton's interpreter.

Not collected by name: `test_layer_programs` runs this file in a process of its own with
`TRITON_INTERPRET=1`, since triton decides at its first import whether it interprets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.gpu.interpreted import interpret_quickly
from pipeline.engine.backend import choose_backend
from pipeline.engine.base import RunControl
from pipeline.engine.kernels.layer_rules import (
    ACTIVATIONS,
    Activation,
    HeadNorms,
    Heads,
    Joint,
    Norm,
    Place,
    Viewing,
    gate_reference,
    join_reference,
    rotate_and_store_reference,
)
from pipeline.engine.kernels.layer_steps import gate, join, rotate_and_store
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny

# Triton 3.6's interpreter makes numbers of arrays of one element, which numpy 2.3 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

interpret_quickly()
NAN = float("nan")
MARGIN = 64
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
some_dtype = st.sampled_from(list(TOLERANCE))
some_width = st.sampled_from([1, 2, 7, 16, 33, 64, 100, 129])


class Guarded(NamedTuple):
    """A dense tensor amid NaN, which must be neither read nor written."""

    tensor: Tensor
    room: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Guarded:
        room = torch.full((tensor.numel() + 2 * MARGIN,), NAN).to(tensor.dtype)
        room[MARGIN:-MARGIN] = tensor.flatten()
        return cls(room[MARGIN:-MARGIN].view(tensor.shape), room)

    def is_whole(self) -> bool:
        return bool(self.room[:MARGIN].isnan().all() and self.room[-MARGIN:].isnan().all())


FRESH: list[Guarded] = []
"""What the steps have allocated since margins were last looked at."""


@pytest.fixture(autouse=True, scope="module")
def fresh_memory_is_nan() -> Iterator[None]:
    """And lies amid NaN, so that a number shows that is not written, or beyond what is there."""

    plain = Tensor.new_empty

    def new_empty(like: Tensor, *sizes: Any, **options: Any) -> Tensor:
        made = plain(like, *sizes, **options)
        if "device" in options:  # the interpreter's own
            return made
        FRESH.append(Guarded.of(made.fill_(NAN)))
        return FRESH[-1].tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield


class Chance:
    """Random tensors of one dtype, each amid NaN; at the end all margins must be as they were."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._made: list[Guarded] = []

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self._draw) * 2
        self._made.append(Guarded.of(drawn.to(dtype or self._dtype)))
        return self._made[-1].tensor

    def norm(self, width: int) -> Norm:
        return Norm(self.tensor(width, dtype=torch.float32), 1e-6)

    def whole_numbers(self, most: int, count: int) -> Tensor:
        return torch.randint(0, most, (count,), generator=self._draw)

    def slots(self, count: int, capacity: int) -> Tensor:
        return torch.randperm(capacity, generator=self._draw)[:count]

    def assert_margins(self) -> None:
        assert all(made.is_whole() for made in (*self._made, *FRESH))
        FRESH.clear()


def assert_same(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    tolerance = TOLERANCE[out.dtype]
    # What is left of a difference of large numbers is as exact as these are.
    largest = expected.float().nan_to_num(0.0).abs().max().item() if expected.numel() else 0.0
    below = max(tolerance, tolerance * largest) if out.dtype == torch.float32 else tolerance
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=below, equal_nan=True)


@given(st.data(), some_dtype, some_width, st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_join_adds_and_norms(
    data: st.DataObject, dtype: torch.dtype, width: int, count: int, seed: int
) -> None:
    chance, kind = Chance(seed, dtype), st.booleans()
    x = chance.tensor(count, width)
    y = chance.tensor(count, width) if data.draw(kind) else None
    after = chance.norm(width) if data.draw(kind) else None
    rows = chance.whole_numbers(count, data.draw(st.integers(0, 5))) if data.draw(kind) else None
    before = chance.norm(width) if rows is not None or data.draw(kind) else None
    joint = Joint(before, after, data.draw(st.sampled_from([1.0, 0.22])))
    sum_before = x.clone()
    expected = join_reference(sum_before, y, joint, rows)
    out = join(x, y, joint, rows)
    assert_same(out, expected)
    assert_same(x, sum_before)
    assert (out.data_ptr() == x.data_ptr()) == (before is None)
    chance.assert_margins()


def head_shapes() -> Any:
    """(query heads, KV heads, head size, pairs)"""
    return st.sampled_from(
        [(1, 1, 2, 1), (4, 2, 16, 8), (3, 1, 16, 8), (6, 2, 24, 12), (5, 5, 20, 4), (2, 1, 64, 32),
         (9, 3, 64, 32), (4, 1, 80, 16), (14, 2, 6, 3)]
    )  # fmt: skip


@given(
    st.data(), some_dtype, head_shapes(), st.integers(1, 3), st.integers(0, 4),
    st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_heads_are_normed_turned_and_stored(
    data: st.DataObject,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    tokens: int,
    views: int,
    seed: int,
) -> None:
    num_heads, kv_heads, size, pairs = shape
    chance, capacity = Chance(seed, dtype), 9
    qkv = chance.tensor(tokens, (num_heads + 2 * kv_heads) * size)
    normed = data.draw(st.sampled_from([0, 2, num_heads + kv_heads]))
    norms = HeadNorms(chance.tensor(normed, size, dtype=torch.float32), 1e-5) if normed else None
    turns = data.draw(st.booleans())
    table = data.draw(st.sampled_from([dtype, torch.float32]))  # OLMo-2 keeps its tables in float32
    wide = data.draw(st.sampled_from([pairs, 2 * pairs]))
    turn = (chance.tensor(tokens, wide, dtype=table), chance.tensor(tokens, wide, dtype=table))
    viewing = None
    if views:
        cos, sin = (chance.tensor(views, pairs, dtype=torch.float32) for _ in range(2))
        owner = chance.whole_numbers(tokens, views)
        viewing = Viewing(owner, (cos, sin) if turns else None)
    heads = Heads(norms, turn if turns else None, pairs)
    arena = torch.full((2, kv_heads, capacity, size), NAN).to(dtype)
    other, slots = arena.clone(), chance.slots(tokens, capacity)
    out = rotate_and_store(qkv, heads, Place(arena[0], arena[1], slots), viewing)
    expected = rotate_and_store_reference(qkv, heads, Place(other[0], other[1], slots), viewing)
    assert_same(out, expected)
    assert_same(arena, other)
    chance.assert_margins()


@pytest.mark.parametrize("shape", [(3, 2, 80, 16), (2, 1, 10, 2), (1, 1, 96, 24)])
@pytest.mark.parametrize("is_of_all", [False, True])
def test_what_is_not_turned_is_normed_all_the_same(
    shape: tuple[int, int, int, int], is_of_all: bool
) -> None:
    num_heads, kv_heads, size, pairs = shape
    chance = Chance(size, torch.float32)
    qkv = chance.tensor(2, (num_heads + 2 * kv_heads) * size)
    weight = chance.tensor(num_heads + kv_heads if is_of_all else 2, size)
    turn = (chance.tensor(2, 2 * pairs), chance.tensor(2, 2 * pairs))
    heads = Heads(HeadNorms(weight, 1e-5), turn, pairs)
    arena = torch.full((2, kv_heads, 5, size), NAN)
    other, slots = arena.clone(), torch.tensor([4, 1])
    out = rotate_and_store(qkv, heads, Place(arena[0], arena[1], slots))
    assert_same(out, rotate_and_store_reference(qkv, heads, Place(other[0], other[1], slots)))
    assert_same(arena, other)
    chance.assert_margins()


def test_what_is_not_turned_is_kept_to_the_bit() -> None:
    """Values that are not finite among them: a factor of 0 would make them NaN."""
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, float("inf"), 65504.0]])
    arena = torch.zeros(2, 1, 1, 2)
    turn = (torch.zeros(1, 1), torch.ones(1, 1))
    place = Place(arena[0], arena[1], torch.tensor([0]))
    with np.errstate(invalid="ignore"):  # what is computed of them, and not taken
        query = rotate_and_store(qkv, Heads(None, turn, 1), place)
    assert query.tolist() == [[[-2.0, 1.0]]]
    assert arena.flatten().tolist() == [-4.0, 3.0, float("inf"), 65504.0]


def test_padding_writes_to_the_slot_that_belongs_to_nobody() -> None:
    """Several tokens of a recorded step do, at a time."""
    arena = torch.full((2, 1, 4, 2), NAN)
    place = Place(arena[0], arena[1], torch.tensor([1, 3, 3]))
    rotate_and_store(torch.ones(3, 6), Heads(None, None, 1), place)
    assert arena[:, :, 1].eq(1).all() and arena[:, :, [0, 2]].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("width", [1, 33, 1024, 1500])
def test_gate_is_the_activation_times_up(
    width: int, dtype: torch.dtype, activation: Activation
) -> None:
    chance = Chance(width, dtype)
    both = chance.tensor(3, 2 * width)
    assert_same(gate(both, activation), gate_reference(both, activation))
    chance.assert_margins()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_right_far_from_zero(activation: Activation) -> None:
    far = torch.tensor([[-200.0, -30.0, -4.0, 0.0, 4.0, 30.0, 200.0]])
    both = torch.cat([far, torch.ones_like(far)], 1)
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is what is meant
        assert_same(gate(both, activation), gate_reference(both, activation))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_engine_on_these_programs_gives_the_tokens_of_the_plain_model(family: str) -> None:
    loaded = tiny.load_tiny(family)
    shared = list(range(20, 36))
    prompts = [[*shared, 5, 6], [*shared, 7], [11, 12]]
    params = SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=2, temperature=0.8)
    plan = tiny.plan_of(prompts, params, [0, 1, 0])
    plain = NaiveEngine(tiny.load_tiny(family))
    backend = choose_backend(loaded, "auto")
    assert (backend.forward.name, backend.kernel.name, backend.note) == ("triton", "triton", None)
    ours, expected = (
        {c.sequence: c.token_ids for c in e.generate(plan, np.arange(3), RunControl())}
        for e in (PrefixEngine(loaded, EngineSettings(max_batch_tokens=24), backend), plain)
    )
    assert ours == expected
