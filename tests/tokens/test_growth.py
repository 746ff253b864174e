"""How long a tokenizer's steps may make a text: exactly, for steps that replace letters."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

from pipeline.tokens.growth import growth_of

Step = tuple[str | Regex, str]


def backend(*steps: Step) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(*step) for step in steps])
    return tokenizer


@pytest.mark.parametrize(
    ("steps", "growth"),
    [
        ([], 1),
        ([(" ", "▁")], 1),
        ([("``", '"')], 1),
        ([(Regex(r"\s+"), " ")] * 30, 1),
        ([("…", "..."), ("½", "1/2"), ("—", " - ")], 3),
        ([("…", "..."), (".", "..")], 6),
        ([("a", "b" * 10), ("b", "c" * 10), ("c", "d" * 10)], 1000),
        ([("a", "a" * 10)] * 3, 1000),
        ([("ab", "c" * 10), ("c", "dd")], 10),
        ([(Regex("."), "x" * 10)] * 2, 100),
        ([(Regex(""), "x")], 2),
        ([(Regex("(?=a)"), "xx")], 3),
    ],
)
def test_growth_is_what_the_worst_text_comes_to(steps: list[Step], growth: float) -> None:
    """Seen red: as the product of all steps (moses-like normalisers would be refused)."""
    tokenizer = backend(*steps)
    assert growth_of(tokenizer) == growth
    for text in ("a" * 50, "ab" * 25, "…½—." * 9, "  ``"):
        assert len(tokenizer.normalizer.normalize_str(text)) <= growth * len(text) + growth


def test_decoders_and_templates_of_tokens_grow_too() -> None:
    tokenizer = backend()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "a" * 10)] * 4)
    assert growth_of(tokenizer) == 10_000
    tokenizer = backend()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A"] * 7)
    assert growth_of(tokenizer) == 7
