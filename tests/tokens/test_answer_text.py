"""Stops end an answer where `generate(stop_strings=)` ends it; texts go on from their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from pipeline.prompt_settings import TokenSettings
from pipeline.tokens.answer_text import AnswerText
from pipeline.tokens.tokenizer import PromptTokenizer

WORDS = [
    "▁the", "▁", "ta", "▁ta", "\n", "x", "\n\n", "▁a", "b", "c", "A", ":", "é", "a", "d", "e", "f",
]  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer as of Llama 2: the decoder drops the first space of a text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>", "<|im_end|>")]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def ids(tokenizer: Any, *words: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


def test_the_first_space_of_an_answer_is_kept(sentencepiece: Any) -> None:
    text = AnswerText(sentencepiece.backend_tokenizer)
    the, control = ids(sentencepiece, "<s>", "▁the"), ids(sentencepiece, "<|im_end|>") * 40
    answer = ids(sentencepiece, "▁ta", "▁a", "</s>")
    assert text.decode([the], [answer], [()]) == [" ta a"]
    assert text.decode([the + control], [answer], [()]) == [" ta a"]
    assert text.decode([control], [answer], [()]) == ["ta a"]  # a text of its own
    assert text.decode([[]], [answer], [()]) == ["ta a"]
    assert text.decode([the], [[]], [()]) == [""]


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        (["b", "<|im_end|>"], "<|im_end|>", "b"),
        (["b", "<|im_end|>", "c"], "<|im_end|>", "b"),
        (["b", "<|im_end|>", "c"], "end|>c", "b"),
        (["b", "<|im_end|>", "c"], "bc", None),
        (["\n"], "A:\n", ""),
        (["▁a", "b"], "A: ab", ""),
        (["▁a", "b"], ": ", ""),
        (["▁a", "b"], "A:", None),
        (["▁a", "\n\n", "x"], "\n", " a"),
        (["▁a", "\n", "\n", "x"], "\n\n", " a"),
        (["▁a", "▁ta", "x"], "ta", " a "),
        (["é", "x"], "x", "é"),
        (["▁a", "</s>"], "</s>", " a"),
    ],
)
def test_an_answer_ends_where_generate_ends_it(
    sentencepiece: Any, answer: list[str], stop: str, text: str | None
) -> None:
    prompt, output = ids(sentencepiece, "<s>", "A", ":"), ids(sentencepiece, *answer)
    ours = AnswerText(sentencepiece.backend_tokenizer)
    criterion = StopStringCriteria(sentencepiece, [stop])
    ends = range(1, len(output) + 1)
    scores = torch.zeros(1, 1)
    theirs = [bool(criterion(torch.tensor([prompt + output[:n]]), scores)) for n in ends]
    first = next((n for n in ends if theirs[n - 1]), None)
    stopped = [ours.is_stopped(output[:n], (stop,), prompt) for n in ends]
    assert stopped == [first is not None and n >= first for n in ends]
    for before in ([], ids(sentencepiece, "d") * 40):  # of a long answer the last ids are read
        steps = [(before + output[:n], (stop,), prompt) for n in ends]
        whole = [ours.is_stopped(*step) for step in steps]
        just = [ours.has_just_stopped(*step) for step in steps]
        assert just[: (*whole, True).index(True) + 1] == whole[: (*whole, True).index(True) + 1]
    assert (first is None) == (text is None)
    if text is not None:
        assert ours.decode([prompt], [output[:first]], [(stop,)]) == [text]


def test_a_long_stop_string_may_begin_far_up_in_the_prompt(folder: Path) -> None:
    answers = PromptTokenizer.load(str(folder), None, TokenSettings()).answers
    backend = answers._backend
    prompt, answer = (backend.encode(t, add_special_tokens=False).ids for t in ("q" * 60, "qz!"))
    assert answers.is_stopped(answer, ("q" * 61,), prompt)
    assert answers.decode([prompt], [answer], [("q" * 61,)]) == [""]
    assert not answers.is_stopped(answer, ("q" * 60 + "!",), prompt)


def test_an_incomplete_character_is_no_fault(folder: Path) -> None:
    answers = PromptTokenizer.load(str(folder), None, TokenSettings()).answers
    tree = answers._backend.encode("🌲", add_special_tokens=False).ids
    assert answers.decode([[]], [tree], [()]) == ["🌲"]
    assert answers.decode([tree[:2]], [tree[2:]], [()])[0].endswith("🌲")
    assert answers.decode([[]], [tree[:2]], [("x",)]) != [""]
