"""Rows become token ids and parameters that fit the model; what cannot run says why."""

from __future__ import annotations

import pytest

from pipeline.job.prepare import Limits, Preparation
from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import PromptBatch
from pipeline.sampling_settings import SamplingSettings
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tokens.conftest import save_tokenizer

BOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = save_tokenizer(tmp_path_factory.mktemp("prepared"))
    return PromptTokenizer.load(str(folder), None, TokenSettings())


def batch_of(*contents: object, **override: object) -> PromptBatch:
    num = len(contents)
    ids = [str(i) for i in range(num)]
    return PromptBatch(0, ids, list(contents), [override] * num, [None] * num)  # type: ignore[arg-type]


def test_truncate_left_keeps_bos_and_the_last_tokens(tokenizer: PromptTokenizer) -> None:
    prompt = "0123456789 abcdefghijklmnopqrstuvwxyz"
    (whole,) = (tokenizer.encode_batch([prompt]).flat.tolist(),)
    limits = Limits(20, "truncate-left")
    preparation = Preparation(tokenizer, SamplingSettings(max_new_tokens=12), {}, limits)
    prepared = preparation.prepare(batch_of(prompt, "hi", prompt))
    assert prepared.lengths.tolist()[::2] == [8, 8] and prepared.lengths[1] < 8
    assert prepared.flat[:8].tolist() == [BOS, *whole[-7:]]
    assert prepared.flat[-8:].tolist() == [BOS, *whole[-7:]]
    assert [p.max_new_tokens for p in prepared.params] == [12, 12, 12]


def test_the_one_token_that_is_left_is_the_last_one(tokenizer: PromptTokenizer) -> None:
    whole = tokenizer.encode_batch(["0123456789"]).flat.tolist()
    limits = Limits(6, "truncate-left")
    preparation = Preparation(tokenizer, SamplingSettings(max_new_tokens=9), {}, limits)
    assert preparation.prepare(batch_of("0123456789")).flat.tolist() == whole[-1:]


def test_keep_leaves_the_prompt_and_its_limit_as_they_are(tokenizer: PromptTokenizer) -> None:
    """For models whose context is longer than their config says."""
    whole = tokenizer.encode_batch(["0123456789"]).flat.tolist()
    preparation = Preparation(tokenizer, SamplingSettings(max_new_tokens=9), {}, Limits(6, "keep"))
    prepared = preparation.prepare(batch_of("0123456789"))
    assert prepared.flat.tolist() == whole and len(whole) > 6 and not prepared.rejected
    assert prepared.params[0].max_new_tokens == 9


def test_vllm_refuses_the_rows_whose_rules_it_would_leave_out(tokenizer: PromptTokenizer) -> None:
    preparation = Preparation(tokenizer, SamplingSettings(), {}, Limits(None, "error", "vllm"))
    asked = preparation.prepare(batch_of("hi", no_repeat_ngram_size=2))
    assert "nothing that vLLM has" in asked.rejected[0].message
    assert not preparation.prepare(batch_of("hi", repetition_penalty=1.2)).rejected
