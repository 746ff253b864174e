"""Weights from noted queries: those of the model's own eager attention, key by key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.backend import choose_backend
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.observation import (
    Observed,
    Observer,
    SeenSlots,
    Sums,
    attention_weights,
    mass_kept,
    newest,
    window,
)
from pipeline.engine.packing import Packer, Piece, pack_prefill
from pipeline.engine.rotary import Rotary
from pipeline.model.model import LoadedModel
from tests.engine import families
from tests.engine.families import FAMILIES, Family

ROTARY = [family for family in FAMILIES if family.model_type not in ("gpt2", "opt")]
GROUPED = next(family for family in ROTARY if family.id == "llama, grouped heads")
LENGTH = 24
_IDS = np.random.default_rng(0).integers(4, 97, LENGTH)
AHEAD = np.arange(LENGTH)[:, None] < np.arange(LENGTH)


def observe(loaded: LoadedModel, kernels: str, tokens: list[int]) -> tuple[Observer, KVCache]:
    """One prefill of `_IDS` whose queries of `tokens` are noted; KV lies from slot 3 on."""
    backend = choose_backend(loaded, kernels)
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    cache = KVCache(shape, 2 * LENGTH, like=next(loaded.model.parameters()))
    nothing = np.zeros(0, np.int64)
    pieces = [Piece(_IDS, 0, 3, 0, ())]
    batch = pack_prefill(pieces, (nothing, nothing), Packer(backend.kernel, loaded.device))
    observer = Observer(torch.tensor(tokens))
    with torch.inference_mode():
        backend.forward(replace(batch, observer=observer), cache, torch.tensor([0]))
    return observer, cache


def weights_of(*what: Any) -> Tensor:
    return attention_weights(Observed(*what))


def eager_weights(loaded: LoadedModel) -> Tensor:
    """[layers, kv_heads, queries, keys] of all tokens."""
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        ids = torch.from_numpy(_IDS)[None]
        made = loaded.model(ids, output_attentions=True, use_cache=False).attentions
    heads = loaded.shape.num_kv_heads
    return torch.stack([layer[0].unflatten(0, (heads, -1)).mean(1) for layer in made]).float()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_weights_are_those_of_eager_attention(family: Family, kernels: str) -> None:
    loaded = families.load(family)
    expected = eager_weights(loaded)
    observer, cache = observe(loaded, kernels, list(range(LENGTH)))
    which = np.array([5, LENGTH - 1, 0])
    age = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = [SeenSlots(3, 3 + LENGTH, 0)]
    observed = Observed(
        observer, which, seen, cache.arena, Rotary.of(loaded.model), AHEAD[which], age[which]
    )
    for layers in observed.alike():
        got = torch.cat([part for _, part in observed.weights(layers)], 2)
        wanted = expected[layers[0] : layers[-1] + 1, :, which]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_half_precision_is_weighed_in_full(kernels: str) -> None:
    loaded = families.load(GROUPED, torch.bfloat16)
    observer, cache = observe(loaded, kernels, [LENGTH - 2, LENGTH - 1])
    seen, rotary = [SeenSlots(3, 3 + LENGTH, 0)], Rotary.of(loaded.model)
    which = np.array([0, 1])
    got = weights_of(observer, which, seen, cache.arena, rotary, AHEAD[-2:])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:3]))
    torch.testing.assert_close(got, eager_weights(loaded)[:, :, -2:], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_keys_of_another_frame_are_seen_by_their_shift(family: Family) -> None:
    """Keys of 10 .. 20 are stored as if they stood 7 positions earlier, the last ones 40 later."""
    loaded = families.load(family)
    rotary = Rotary.of(loaded.model)
    observer, cache = observe(loaded, "torch", [LENGTH - 1])
    whole = [SeenSlots(3, 3 + LENGTH, 0)]
    expected = weights_of(observer, np.array([0]), whole, cache.arena, rotary)
    for low, high, shift in ((13, 23, 7), (23, 27, -40)):
        for layer in range(loaded.shape.num_layers):
            keys = cache.arena[layer, 0, :, low:high].transpose(0, 1)
            turned = rotary.turn(layer, keys, torch.full((high - low,), -shift))
            cache.arena[layer, 0, :, low:high] = turned.transpose(0, 1)
    seen = [SeenSlots(3, 13, 0), SeenSlots(13, 23, 7), SeenSlots(23, 27, -40)]
    got = weights_of(observer, np.array([0]), seen, cache.arena, rotary)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    if any(key is not None for key in rotary.keys):
        wrong = weights_of(observer, np.array([0]), whole, cache.arena, rotary)
        assert (wrong - expected).abs().max() > 1e-3


def test_a_layer_that_is_computed_again_counts_once() -> None:
    loaded = families.load(GROUPED)
    observer, _ = observe(loaded, "torch", [3])
    before = list(observer.layers)
    observer.take(0, torch.zeros(LENGTH, 4, 16), before[0][1])
    assert len(observer.layers) == 1
    for layer, (query, rules) in enumerate(before[1:], 1):
        observer.take(layer, query.expand(LENGTH, -1, -1), rules)
    assert len(observer.layers) == len(before)


def test_the_queries_are_copies() -> None:
    query = torch.ones(4, 2, 8)
    observer = Observer(torch.tensor([1]))
    observer.take(0, query, None)  # type: ignore[arg-type]
    query.zero_()
    assert (observer.layers[0][0] == 1).all()


def test_reductions() -> None:
    weights = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(newest(weights), weights[:, :, -1].mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(window(weights), weights.mean(2), rtol=1e-6)
    assert newest(weights).dtype == window(weights).dtype == np.float32
    every = np.ones(5, bool)
    assert mass_kept(weights, every) == pytest.approx(1)
    kept = np.array([True, False, True, True, False])
    last = weights[:, :, -1]
    share = (last[..., kept].sum(-1) / last.sum(-1)).mean()
    assert mass_kept(weights, kept) == pytest.approx(float(share))
    by_head = np.zeros((2, 3, 5), bool)
    by_head[..., :2] = True
    share = (last[..., :2].sum(-1) / last.sum(-1)).mean()
    assert mass_kept(weights, by_head) == pytest.approx(float(share))


def test_sums_outlive_an_eviction_of_each_head() -> None:
    """Two forwards, an eviction by head between: each key has the mean of what it got since it
    came, from the queries that could see it."""
    loaded = families.load(GROUPED)
    observer, cache = observe(loaded, "torch", list(range(LENGTH)))
    rotary, layers, heads = Rotary.of(loaded.model), 3, 2
    sums = Sums(layers, heads, torch.device("cpu"))
    first = np.arange(10)

    def observed(which: np.ndarray[Any, Any], stop: int) -> Observed:
        seen = [SeenSlots(3, 3 + stop, 0)]
        return Observed(observer, which, seen, cache.arena, rotary, AHEAD[which, :stop])

    sums.add(observed(first, 10))
    assert len(sums) == 10
    weights = weights_of(
        observer, first, [SeenSlots(3, 13, 0)], cache.arena, rotary, AHEAD[:10, :10]
    )
    counts = np.arange(10, 0, -1)
    np.testing.assert_allclose(sums.means(len(sums)), weights.sum(2).numpy() / counts, rtol=1e-5)
    kept = np.stack([np.roll(np.arange(10) % 2 == 0, i) for i in range(6)]).reshape(3, 2, 10)
    sums.keep(kept)
    expected = (weights.sum(2).numpy() / counts)[kept].reshape(3, 2, 5)
    np.testing.assert_allclose(sums.means(len(sums)), expected, rtol=1e-5)
    sums.keep(np.array([True, True, True, False, False]))
    assert len(sums) == 3 and (sums.means(5)[..., 3:] == 0).all()
    sums.keep(np.array([True, True, True, False, False]))
    sums.add(observed(np.array([4]), 5))  # as if slots 3 .. 8 held the three and two new ones
    more = weights_of(
        observer, np.array([4]), [SeenSlots(3, 8, 0)], cache.arena, rotary, AHEAD[4:5, :5]
    ).numpy()
    count = np.broadcast_to(counts, (3, 2, 10))[kept].reshape(3, 2, 5)[..., :3]
    np.testing.assert_allclose(
        sums.means(len(sums))[..., :3],
        (expected[..., :3] * count + more[:, :, 0, :3]) / (count + 1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(sums.means(len(sums))[..., 3:], more[:, :, 0, 3:], rtol=1e-5)
