"""Texts that begin alike, tokenised in pieces: the tokens are those of each text by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as split

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
pytestmark = pytest.mark.filterwarnings("default")

from transformers import PreTrainedTokenizerFast  # noqa: E402

from kvcoppice.evaluation.shared_texts import DifferentTokens, encode_shared  # noqa: E402
from kvcoppice.evaluation.texts import Texts  # noqa: E402
from pipeline.tokens.words import makes_tokens_of_words  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo_model" / "tokenizer.json"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS: dict[str, Any] = {
    "gpt2": split.ByteLevel(add_prefix_space=False),
    "gpt2, prefix space": split.ByteLevel(add_prefix_space=True),
    "llama3": split.Sequence(
        [
            split.Split(Regex(LLAMA_3), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "metaspace": split.Metaspace(prepend_scheme="first", split=True),
    "metaspace, always": split.Metaspace(prepend_scheme="always", split=True),
    "no words": split.Metaspace(prepend_scheme="first", split=False),
}
WORDS = ("the", "house", "it's", "É", "naïve", "42", "3.14", "a", "I", "(B)", "\n", " ", "end.")


def texts_of(draw: random.Random) -> list[str]:
    """Beginnings in common, of any length, and ends that go on inside of words and after blanks."""

    def some(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    found = [some(9)]
    for _ in range(40):
        start = draw.choice(found)
        cut = draw.choice([len(start), draw.randrange(len(start) + 1)])
        found.append(start[:cut] + draw.choice(["", " ", "\n", "s"]) + some(draw.randrange(1, 30)))
    return found


def train(splitter: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts_of(random.Random(7)), trainer)
    return tokenizer


def plain(tokenizer: Tokenizer, texts: list[str], adds: bool = False) -> list[Any]:
    encoded = tokenizer.encode_batch(texts, add_special_tokens=adds)
    return [np.array(one.ids, np.uint32) for one in encoded]


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_give_the_tokens_of_the_whole(name: str, seed: int) -> None:
    tokenizer = train(SPLITTERS[name])
    assert makes_tokens_of_words(tokenizer) is (name != "no words")
    if name != "no words":
        texts = texts_of(random.Random(seed))
        found = encode_shared(texts, lambda some: plain(tokenizer, some))
        for text, ids in zip(texts, plain(tokenizer, texts), strict=True):
            assert np.array_equal(found[text], ids), text


def test_each_beginning_becomes_tokens_once() -> None:
    shots, letters = "The examples are the same for all of them. " * 40, 0
    texts = [
        f"{shots}Question number {i} asks what it asks?\nAnswer:{choice}"
        for i in range(50)
        for choice in (" A", " B", " C", " D")
    ]

    def count(some: list[str]) -> list[Any]:
        nonlocal letters
        letters += sum(map(len, some))
        return plain(tokenizer, some)

    tokenizer = Tokenizer.from_file(str(DEMO))
    found = encode_shared(texts, count)
    assert letters < sum(map(len, texts)) / 4  # which is mostly those that are compared
    for text, ids in zip(texts, plain(tokenizer, texts), strict=True):
        assert np.array_equal(found[text], ids)


def test_a_tokenizer_whose_tokens_reach_over_words_is_left_alone() -> None:
    tokenizer = train(SPLITTERS["gpt2"])
    tokenizer.add_tokens([AddedToken("the house")])
    assert not makes_tokens_of_words(tokenizer)
    stripping = train(SPLITTERS["gpt2"])
    stripping.add_tokens([AddedToken("<x>", rstrip=True)])
    assert not makes_tokens_of_words(stripping)


@pytest.mark.parametrize("adds", [None, True, False])
def test_where_pieces_differ_texts_are_tokenised_whole(adds: bool | None) -> None:
    tokenizer = train(SPLITTERS["gpt2"], normalizers.Strip())
    texts = [f"{'the house is the end of a house ' * 4}{end}" for end in ("a", "I", "the")]
    assert makes_tokens_of_words(tokenizer)
    with pytest.raises(DifferentTokens):
        encode_shared(texts, lambda some: plain(tokenizer, some))
    found = Texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), None, 0).encode(texts, adds)
    for text, ids in zip(texts, plain(tokenizer, texts), strict=True):
        assert np.array_equal(found[text], ids)


def test_special_tokens_stand_around_the_whole() -> None:
    tokenizer = train(SPLITTERS["llama3"])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    texts = texts_of(random.Random(1))
    begun = [f"<s>{text}" for text in texts[:5]]
    found = Texts(fast, None, None).encode([*texts, *begun])
    for text, ids in zip(texts, plain(tokenizer, texts, adds=True), strict=True):
        assert np.array_equal(found[text], ids)
    for text, ids in zip(begun, plain(tokenizer, begun, adds=False), strict=True):
        assert np.array_equal(found[text], ids)
