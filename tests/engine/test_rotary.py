"""Turns by whole positions: they are what each family's own forward does to its keys."""

from __future__ import annotations

import pytest
import torch

from pipeline.engine.rotary import Rotary
from pipeline.errors import ModelError
from tests.engine import families
from tests.engine.families import FAMILIES, Family

LEARNED = ("gpt2", "opt")
ROTARY = [family for family in FAMILIES if family.model_type not in LEARNED]


@pytest.mark.parametrize("family", ROTARY, ids=lambda family: family.id)
def test_a_turned_key_is_the_key_of_the_other_position(family: Family) -> None:
    """In every layer: hidden states depend on no position alone, so keys differ by a turn only."""
    model = families.build(family.config())
    model.set_attn_implementation("eager")
    rotary = Rotary.of(model)
    ids = torch.randint(4, 97, (1, 30), generator=torch.Generator().manual_seed(1))
    here, there = torch.arange(30)[None], torch.arange(41, 71)[None]
    with torch.inference_mode():
        made, expected = (
            model(ids, position_ids=at, use_cache=True).past_key_values for at in (here, there)
        )
    shifts = torch.full((30,), 41)
    moved = []
    for layer, (before, after) in enumerate(zip(made.layers, expected.layers, strict=True)):
        kept = before.keys.shape[2]  # a layer with a window keeps the last tokens alone
        heads = before.keys[0].transpose(0, 1)
        turned = rotary.turn(layer, heads, shifts[-kept:])
        wanted = after.keys[0].transpose(0, 1)
        torch.testing.assert_close(turned, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        torch.testing.assert_close(before.values, after.values, rtol=1e-4, atol=1e-3)
        moved.append(not torch.allclose(heads, wanted, atol=1e-2))
    assert moved == [key is not None for key in rotary.keys]


@pytest.mark.parametrize("family_id", ["llama, grouped heads", "cohere, interleaved rotary"])
def test_turns_compose(family_id: str) -> None:
    rotary = Rotary.of(families.build(next(f for f in ROTARY if f.id == family_id).config()))
    heads = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))
    there, back = torch.tensor([7, 100_000, -4]), torch.tensor([-7, -100_000, 4])
    turned = rotary.turn(0, heads, there)
    assert (turned - heads).abs().amax((1, 2)).min() > 0.1
    torch.testing.assert_close(rotary.turn(0, turned, back), heads, rtol=0, atol=1e-5)


def test_a_turn_keeps_the_dtype_and_what_is_not_turned() -> None:
    phi = next(f for f in ROTARY if f.model_type == "phi")
    rotary = Rotary.of(families.build(phi.config()))
    heads = torch.randn(2, 4, 16).bfloat16()
    turned = rotary.turn(0, heads, torch.tensor([5, 9]))
    assert turned.dtype == torch.bfloat16
    width = 2 * len(rotary.frequencies["inv_freq"])
    assert width < 16 and torch.equal(turned[..., width:], heads[..., width:])


@pytest.mark.parametrize("model_type", LEARNED)
def test_learned_positions_are_refused_by_name(model_type: str) -> None:
    family = next(f for f in FAMILIES if f.model_type == model_type)
    with pytest.raises(ModelError, match=f"a '{model_type}' model has no rotary positions"):
        Rotary.of(families.build(family.config()))
