"""A text has at least as many tokens as is said of it; where that cannot be known, nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pipeline.prompt_settings import TokenSettings
from pipeline.tokens.coverage import most_characters
from pipeline.tokens.text_encoder import TextEncoder
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tokens.conftest import save_tokenizer

CORPUS = ["hello hello there", "  say   now", "aaaaaaaaaaaaaaaa", "éé ünï 🌲🌲"] * 9


def byte_level() -> Tokenizer:
    """Like GPT-2, Llama 3 and gpt-oss."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def byte_fallback(is_on: bool = True) -> Tokenizer:
    """Like Llama 2 and Gemma: pieces of text, and bytes where there is none."""
    words = ["▁", "h", "e", "l", "o", "he", "hel", "hell", "hello", "▁hello", "▁▁"]
    merges = [("h", "e"), ("he", "l"), ("hel", "l"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=is_on, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return backend


BACKENDS = {make.__name__: make() for make in (byte_level, byte_fallback)}
texts = st.text() | st.text(alphabet="hello  aé🌲\0\n", max_size=60)


@pytest.mark.parametrize("name", BACKENDS)
@given(texts)
def test_no_token_covers_more(name: str, text: str) -> None:
    backend = BACKENDS[name]
    most = most_characters(backend)
    assert most is not None and most <= 20
    assert len(backend.encode(text).ids) >= len(text) / most


def without(backend: Tokenizer, token: str) -> Tokenizer:
    """The same with one token fewer."""
    vocabulary = backend.get_vocab()
    del vocabulary[token]
    backend.model = models.BPE(vocabulary, [], byte_fallback=backend.model.byte_fallback)
    return backend


def change(**parts: Any) -> Callable[[Tokenizer], Tokenizer]:
    def apply(backend: Tokenizer) -> Tokenizer:
        for name, value in parts.items():
            setattr(backend, name, value)
        return backend

    return apply


def swallowing(backend: Tokenizer) -> Tokenizer:
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def truncating(backend: Tokenizer) -> Tokenizer:
    backend.enable_truncation(5)
    return backend


SPLIT = pre_tokenizers.Split(" ", "removed")
UNSURE: dict[str, Callable[[], Tokenizer]] = {
    "strips": lambda: change(normalizer=normalizers.Strip())(byte_level()),
    "composes": lambda: change(normalizer=normalizers.NFC())(byte_level()),
    "collapses": lambda: change(normalizer=normalizers.Replace("  ", " "))(byte_level()),
    "deletes": lambda: change(normalizer=normalizers.Replace(" ", ""))(byte_level()),
    "drops spaces": lambda: change(
        pre_tokenizer=pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel()])
    )(byte_level()),
    "splits at white space": lambda: change(pre_tokenizer=pre_tokenizers.Whitespace())(
        byte_fallback()
    ),
    "drops all": lambda: change(
        post_processor=processors.TemplateProcessing(single="h", special_tokens=[("h", 0)])
    )(byte_level()),
    "swallows": lambda: swallowing(byte_level()),
    "truncates": lambda: truncating(byte_level()),
    "lacks a byte": lambda: without(byte_level(), "a"),
    "lacks a fallback": lambda: without(byte_fallback(), "<0x00>"),
    "does not fall back": lambda: byte_fallback(False),
    "has whole words": lambda: change(model=models.WordLevel({"a": 0}, unk_token="a"))(
        byte_level()
    ),
}


@pytest.mark.parametrize("name", UNSURE)
def test_where_a_token_could_cover_any_text_nothing_is_said(name: str) -> None:
    """Seen red: each of the conditions left out."""
    assert most_characters(UNSURE[name]()) is None


CHAT = [{"role": "user", "content": "x" * 4000}]


@pytest.mark.parametrize("content", ["x" * 4000, CHAT, [{**CHAT[0], "name": "<|im_end|>"}]])
def test_what_is_sure_to_be_too_long_is_not_tokenised(
    tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = PromptTokenizer.load(str(save_tokenizer(tmp_path)), None, TokenSettings())
    whole = int(tokenizer.encode_batch([content]).lengths[0])
    least = tokenizer.encode_batch(["hello", content, None], 5).overlong
    assert list(least) == [1] and 5 < least[1] <= whole
    seen: list[int] = []
    real = TextEncoder.encode

    def encode(self: TextEncoder, texts: list[str], **flags: bool) -> list[list[int]]:
        seen.extend(map(len, texts))
        return real(self, texts, **flags)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    batch = tokenizer.encode_batch(["hello", content, None], 5)
    assert batch.lengths.tolist()[1:] == [0, 0] and batch.lengths[0] > 0 and batch.errors == {}
    assert seen == [5]
    assert tokenizer.encode_batch([content], whole).lengths.tolist() == [whole]
