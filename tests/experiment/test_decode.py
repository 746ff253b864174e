"""Recycled KV changes no token, at any depth; the paper's way of handing it over does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pipeline.experiment.decode import GreedyDecoder, cache_of
from pipeline.experiment.naive_paper import generate_naively
from tests.engine.tiny import VOCABULARY, build_model

_LENGTH = 17
_NEW = 6


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_model(request.param).eval()


def prompt(seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, _LENGTH).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_every_depth_writes_the_same_tokens(model: PreTrainedModel, seed: int) -> None:
    """Seen red: positions from the suffix's start, `arange(0, len(fed))`; a mask of m - r."""
    decoder, ids = GreedyDecoder(model, _NEW), prompt(seed)
    kv = decoder.compute_kv(ids)
    expected = decoder.generate(ids).token_ids
    assert expected == decoder.reference(ids)
    for reused in range(_LENGTH):
        assert decoder.generate(ids, kv[:, :, :, :reused]).token_ids == expected, reused


def test_every_depth_gives_the_same_logits(model: PreTrainedModel) -> None:
    """Seen red: the KV of another prompt's beginning."""
    decoder, ids = GreedyDecoder(model, _NEW), prompt()
    kv = decoder.compute_kv(ids)
    expected = decoder.logits(ids, 0, DynamicCache())
    for reused in range(_LENGTH):
        cache = cache_of(kv[:, :, :, :reused] if reused else None, model.device)
        torch.testing.assert_close(decoder.logits(ids[reused:], reused, cache), expected)


def test_the_last_prompt_token_is_always_fed(model: PreTrainedModel) -> None:
    decoder, ids = GreedyDecoder(model, _NEW), prompt()
    with pytest.raises(ValueError, match="cannot be reused"):
        decoder.generate(ids, decoder.compute_kv(ids))


def test_decoding_leaves_the_kv_as_it_was(model: PreTrainedModel) -> None:
    decoder, ids = GreedyDecoder(model, _NEW), prompt()
    kv = decoder.compute_kv(ids)
    copy = kv.clone()
    decoder.generate(ids, kv[:, :, :, :5])
    assert torch.equal(kv, copy)


def test_an_end_of_text_token_ends_nothing() -> None:
    """Lengths are fixed. Seen red: `reference` with the model's own generation settings."""
    model = build_model("llama").eval()
    decoder = GreedyDecoder(model, _NEW)
    expected = decoder.generate(prompt()).token_ids
    model.generation_config.eos_token_id = expected[1]
    assert decoder.generate(prompt()).token_ids == expected
    assert decoder.reference(prompt()) == expected
    assert model.generation_config.eos_token_id == expected[1]


@pytest.mark.parametrize(("reused", "route"), [(3, "generate"), (7, "generate"), (12, "emulated")])
def test_the_papers_call_gives_other_answers(
    model: PreTrainedModel, reused: int, route: str
) -> None:
    decoder = GreedyDecoder(model, _NEW)
    same = 0
    for seed in range(8):
        ids = prompt(seed)
        kv = decoder.compute_kv(ids)[:, :, :, :reused]
        answer = generate_naively(model, ids[reused:], kv, _NEW)
        assert answer.route == route
        assert len(answer.token_ids) == _NEW
        same += answer.token_ids == decoder.generate(ids).token_ids
    assert same < 4


def test_the_emulated_call_feeds_the_last_id_at_the_suffixs_own_position() -> None:
    """What transformers 4.30 to 4.47 made of a suffix no longer than the cache."""
    model = build_model("gpt2").eval()
    decoder, ids = GreedyDecoder(model, 1), prompt()
    kv = decoder.compute_kv(ids)[:, :, :, :12]
    suffix = ids[12:]
    cache = cache_of(kv, model.device)
    with torch.inference_mode():
        logits = model(
            torch.tensor([suffix[-1:]]),
            position_ids=torch.tensor([[len(suffix) - 1]]),
            past_key_values=cache,
        ).logits[0, -1]
    answer = generate_naively(model, suffix, kv, 1)
    assert answer == ((int(logits.argmax()),), "emulated")
