"""Positions, told apart by what transformers' own forward says with masks and positions given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.stateful.cache import Cache
from tests.stateful.models import build_llama

IDS = torch.randint(3, 280, (2, 60), generator=torch.Generator().manual_seed(3))
STEPS = [(0, 24), (24, 40), (40, 52), (52, 60)]
MODEL = build_llama()


def keep(held: int, which: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of two rows; `scattered`: another set in each row, layer and head."""
    if which == "recent":
        return np.broadcast_to(np.arange(held) >= held - 14, (2, held)).copy()
    if which == "sinks":
        at = np.arange(held)
        return np.broadcast_to((at < 4) | (at >= held - 10), (2, held)).copy()
    drawn = np.random.default_rng(held).random((2, 2, 2, held))
    return drawn >= np.sort(drawn)[..., [-14]]


def stream(positions: Any, which: str | None) -> tuple[list[Tensor], Cache, list[Tensor]]:
    """(logits behind each step, the cache, numbers that each step found)."""
    cache = Cache(MODEL, 2, positions)
    logits, found = [], []
    for low, high in STEPS:
        if which is not None and low:
            cache.keep(keep(cache.held, which))
        found.append(cache.number.clone())
        logits.append(cache.feed(IDS[:, low:high], is_prefill=True))
    return logits, cache, found


@torch.inference_mode()
def masked(found: list[Tensor], row: int) -> list[Tensor]:
    """One forward at true positions, under the mask of who was there when a token came."""
    total = STEPS[-1][1]
    sees = torch.zeros(total, total, dtype=torch.bool)
    for (low, high), numbers in zip(STEPS, found, strict=True):
        for token in range(low, high):
            sees[token, numbers[row, 0, 0]] = True
            sees[token, low : token + 1] = True
    mask = torch.zeros(1, 1, total, total).masked_fill(~sees, float("-inf"))
    said = MODEL(IDS[[row]], attention_mask=mask, use_cache=False).logits[0]
    return [said[high - 1] for _, high in STEPS]


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("positions", ["gap", "rerotate", "stale"])
def test_without_evictions_all_is_plain_full_prefill(positions: str) -> None:
    logits, cache, _ = stream(positions, None)
    with torch.inference_mode():
        whole = MODEL(IDS, use_cache=False).logits
    for said, (_, high) in zip(logits, STEPS, strict=True):
        assert largest(said, whole[:, high - 1]) < 1e-5
    assert cache.standing() == (60, 0, 0, 1, 0.0)


@pytest.mark.parametrize("which", ["recent", "sinks"])
def test_gap_is_one_forward_with_a_mask_that_changes_with_time(which: str) -> None:
    logits, _, found = stream("gap", which)
    for row in range(2):
        for said, wanted in zip(logits, masked(found, row), strict=True):
            assert largest(said[row], wanted) < 1e-5


def test_gap_and_rerotate_are_one_function_of_one_run() -> None:
    for said, wanted in zip(
        stream("gap", "recent")[0], stream("rerotate", "recent")[0], strict=True
    ):
        assert largest(said, wanted) < 1e-5
    apart = zip(stream("gap", "sinks")[0], stream("rerotate", "sinks")[0], strict=True)
    assert max(largest(said, wanted) for said, wanted in apart) > 1e-3


@torch.inference_mode()
def test_rerotate_is_a_forward_over_unturned_keys_at_their_ranks() -> None:
    """Layer 0 alone, whose keys depend on nothing before: from projections of the tokens kept."""
    _, cache, _ = stream("rerotate", "scattered")
    layer = MODEL.model.layers[0]
    normed = layer.input_layernorm(MODEL.get_input_embeddings()(IDS))
    for row in range(2):
        for head in range(2):
            numbers = cache.number[row, 0, head]
            assert (numbers.diff() > 0).all() and len(numbers) == 14 + 8
            keys = layer.self_attn.k_proj(normed[row, numbers]).view(-1, 2, 8)[:, head]
            torch.testing.assert_close(cache.keys[0][row, head], keys)
    assert torch.equal(cache.stands()[0, 1, 1], torch.arange(22))
    assert not torch.equal(cache.number[0, 0], cache.number[0, 1])


def test_stale_places_new_tokens_where_old_keys_stand() -> None:
    gap, stale = stream("gap", "recent"), stream("stale", "recent")
    assert max(largest(a, b) for a, b in zip(stale[0], gap[0], strict=True)) > 1e-2
    cache = Cache(MODEL, 2, "stale")
    cache.feed(IDS[:, :24], is_prefill=True)
    cache.keep(keep(24, "recent"))
    assert cache.standing().skew == 10 and cache.next_position == 14
    cache.feed(IDS[:, 24:40], is_prefill=True)
    assert cache.standing().duplicate_positions == 10
    assert torch.equal(cache.born[0, 0, 0, -16:], torch.arange(14, 30))
    assert stale[0][0].equal(gap[0][0])


def test_what_was_seen_sums_to_one_for_each_query_and_follows_its_tokens() -> None:
    cache = Cache(MODEL, 2, "gap")
    cache.feed(IDS[:, :24], is_prefill=True)
    seen = cache.seen
    for weights in (seen.newest, seen.window):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 2))
    torch.testing.assert_close(seen.sums.sum(-1), torch.full((2, 2, 2), 24.0))
    assert torch.equal(seen.queries[0, 0, 0], torch.arange(24.0, 0, -1))
    assert torch.equal(seen.of("snapkv"), seen.window)
    torch.testing.assert_close(seen.of("attention-top"), seen.newest.mean((1, 2)))
    before, kept = seen.sums[0, 0, 0], keep(24, "sinks")
    cache.keep(kept)
    assert torch.equal(cache.seen.sums[0, 0, 0], before[torch.from_numpy(kept[0])])
    cache.feed(IDS[:, 24:25], is_prefill=False)
    assert torch.equal(cache.seen.window[..., -1], torch.zeros(2, 2, 2))
    torch.testing.assert_close(cache.seen.newest.sum(-1), torch.ones(2, 2, 2))


def test_what_does_not_weigh_computes_the_same() -> None:
    plain = Cache(MODEL, 2, "rerotate", weighs=False)
    for (low, high), wanted in zip(STEPS, stream("rerotate", "scattered")[0], strict=True):
        if low:
            plain.keep(keep(plain.held, "scattered"))
        assert largest(plain.feed(IDS[:, low:high], is_prefill=True), wanted) < 1e-5
    assert plain.seen.newest.shape[-1] == 0
