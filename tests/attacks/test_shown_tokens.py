"""Tokens of log-probabilities, as tokenizers of several kinds spell them, and as responses have
them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.inputs.openai_choices import choices_of
from pipeline.tokens.answer_text import AnswerText

WORDS = ["▁yes", "▁no", "yes", "▁", "s", "<0xE2>", "<0x82>", "<0xAC>", "</s>"]


def sentencepiece() -> Tokenizer:
    """As Llama 2 and its kin decode: the blank that a text begins with goes."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="s"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_a_token_keeps_the_blank_that_it_begins_with() -> None:
    """Seen red: " yes" was "yes", so that the tokens of an answer did not make up its text."""
    text = AnswerText(sentencepiece())
    assert text.spell([0, 2, 3, 4, 8, 1]) == [" yes", "yes", " ", "s", "</s>", " no"]
    ids = [0, 4, 1, 0]
    (shown,) = text.decode([[1]], [ids], [()])
    assert "".join(text.spell(ids)) == shown


def test_a_piece_of_a_character_is_spelt_as_one() -> None:
    text = AnswerText(sentencepiece())
    assert text.spell([5, 6, 7]) == ["\ufffd"] * 3
    level = Tokenizer(models.BPE({"â": 0, "Ĥ": 1, "¬": 2, "Ġa": 3}, []))
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    assert AnswerText(level).spell([0, 1, 2, 3]) == ["\ufffd", "\ufffd", "\ufffd", " a"]


@pytest.mark.parametrize(
    ("token", "expected"), [(" yes", [32, 121, 101, 115]), ("€", [226, 130, 172]), ("\ufffd", None)]
)
def test_bytes_of_a_response_are_those_of_the_token_or_not_said(
    token: str, expected: list[int] | None
) -> None:
    """Seen red: pieces of characters had the bytes of U+FFFD, which a client would put together."""
    said = {"token": token, "token_id": 1, "logprob": -0.5}
    row: dict[str, Any] = {
        "generated_text": "x", "finish_reason": "stop", "logprobs": [{**said, "top": [said]}],
    }  # fmt: skip
    (choice,) = choices_of(row, is_chat=True, name="n")
    (content,) = choice["logprobs"]["content"]
    assert content["bytes"] == expected == content["top_logprobs"][0]["bytes"]
