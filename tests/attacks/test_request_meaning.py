"""Fields of requests, two at a time, against a decoder that was written from vLLM's documentation
alone: one row, no cache, plain numpy. And log-probabilities of all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_model, write_prompts

Row = dict[str, Any]
PROMPTS = ["what is it, and why?", "abc abc abc", "one two three one two"]
MOST = 8
FIELDS: list[Row] = [
    {"presence_penalty": 2},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -1},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"logit_bias": {"5": 100, "7": -100, "20": 0.25}},
    {"logit_bias": {"1": 100}},
    {"allowed_token_ids": [1, 5, 6, 7, 8, 9, 30, 31]},
    {"allowed_token_ids": [12]},
    {"bad_words": ["a", "e", "th", "o n"]},
    {"min_tokens": 4},
    {"min_tokens": 8},
    {"stop_token_ids": [3, 4, 5, 6, 10, 11, 12, 13, 14]},
    {"stop": ["e", "t ", "zz"]},
    {"stop": "a", "include_stop_str_in_output": True},
    {"skip_special_tokens": False},
    {"ignore_eos": True},
    {"max_tokens": 1},
    {"max_tokens": 5},
    {"logprobs": True, "top_logprobs": 20},
    {"logprobs": 1},
    {"n": 1, "best_of": 1},
    {"temperature": 0},
    {"top_k": 1, "temperature": 3.0},
    {"seed": 7},
    {"top_p": 0.5, "top_k": -1},
    {"min_p": 0.1},
]  # fmt: skip
PAIRS = [{**a, **b} for a, b in combinations(FIELDS, 2) if not a.keys() & b.keys()] + FIELDS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("meant") / "model", sharpness=2.0)


@cache
def loaded(model: str) -> tuple[Any, Any]:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(model), network


def logits_after(network: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = network(torch.tensor([ids])).logits[0, -1].numpy()
    return found


def decode(model: Path, prompt: str, asked: Row) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Greedy: each token, and the model's own logits for it."""
    tokenizer, network = loaded(str(model))
    begin: list[int] = tokenizer(prompt)["input_ids"]
    out: list[int] = []
    words = [tokenizer(word.lstrip())["input_ids"] for word in asked.get("bad_words", [])]
    words += [tokenizer(" " + word)["input_ids"] for word in asked.get("bad_words", [])]
    words = [w for i, w in enumerate(words) if i < len(words) // 2 or _stands_within(words, i)]
    stops = asked.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    least, ends = asked.get("min_tokens", 0), {*asked.get("stop_token_ids", [])}
    while len(out) < asked.get("max_tokens", MOST):
        raw = logits_after(network, begin + out)
        x = raw.astype(np.float32).copy()
        if "allowed_token_ids" in asked:
            x[[t for t in range(len(x)) if t not in asked["allowed_token_ids"]]] = -np.inf
        for word in words:
            if out[len(out) - len(word) + 1 :] == word[:-1] and len(word) - 1 <= len(out):
                x[word[-1]] = -np.inf
        if len(out) < least:
            x[[1, *ends]] = -np.inf
        for token, bias in asked.get("logit_bias", {}).items():
            x[int(token)] += np.float32(bias)
        penalty = np.float32(asked.get("repetition_penalty", 1.0))
        for token in {*begin, *out}:
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        for token in set(out):
            x[token] -= np.float32(asked.get("frequency_penalty", 0.0) * out.count(token))
            x[token] -= np.float32(asked.get("presence_penalty", 0.0))
        if not np.isfinite(x).any():
            return
        token = int(x.argmax())
        out.append(token)
        yield token, raw
        if token in ends or (token == 1 and not asked.get("ignore_eos")):
            return
        text = tokenizer.decode(begin + out, skip_special_tokens=False)
        if len(out) > least and any(text.endswith(stop) for stop in stops):
            return


def _stands_within(words: list[list[int]], place: int) -> bool:
    """As vLLM has it: with a space before it, where that gives as many tokens of another begin."""
    bare = words[place - len(words) // 2]
    return len(words[place]) == len(bare) and words[place][0] != bare[0]


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Row, Row]]:
    """All pairs in one job: prompt, what was asked, the row of the output."""
    folder = tmp_path_factory.mktemp("pairs")
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(PAIRS))]
    cells = [json.dumps(pair) for pair in PAIRS]
    source = write_prompts(folder / "p.parquet", list(prompts), sampling_params=cells)
    flat = {"model": str(model), "dtype": "float32", "max_new_tokens": MOST}
    run_job(str(source), folder / "out", JobSettings.from_flat(flat | {"fail_on_error": "100%"}))
    rows = answers(folder / "out").to_dicts()
    return list(zip(prompts, PAIRS, rows, strict=True))


def test_two_fields_at_a_time_mean_what_vllm_says(
    model: Path, done: list[tuple[str, Row, Row]]
) -> None:
    seen, refused, wrong = 0, [], []
    for prompt, asked, row in done:
        if row["status"] == "error":
            refused.append((asked, row["error_message"]))
            continue
        if asked.get("temperature", 0) > 0 and asked.get("top_k") != 1:
            continue
        seen += 1
        expected = [token for token, _ in decode(model, prompt, asked)]
        if row["completion_token_ids"] != expected:
            wrong.append((prompt, asked, row["completion_token_ids"], expected))
    assert not wrong, wrong[:5]
    assert seen > 300
    for asked, message in refused:
        assert "min_tokens" in message and asked["min_tokens"] > asked["max_tokens"], (
            asked, message,
        )  # fmt: skip


def test_log_probabilities_are_those_of_plain_logits_beside_every_other_field(
    model: Path, done: list[tuple[str, Row, Row]]
) -> None:
    worst, seen = 0.0, 0
    for prompt, asked, row in done:
        if "logprobs" not in asked or row["status"] == "error":
            assert row["logprobs"] is None
            continue
        assert [said["token_id"] for said in row["logprobs"]] == row["completion_token_ids"]
        tokenizer, network = loaded(str(model))
        ids = tokenizer(prompt)["input_ids"]
        for place, said in enumerate(row["logprobs"]):
            raw = logits_after(network, ids + row["completion_token_ids"][:place]).astype(float)
            truth = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
            worst = max(worst, abs(said["logprob"] - truth[said["token_id"]]))
            top = asked.get("top_logprobs", 1 if asked["logprobs"] == 1 else 0)
            assert [one["token_id"] for one in said["top"]] == np.argsort(-truth)[:top].tolist()
            worst = max(worst, *(abs(t["logprob"] - truth[t["token_id"]]) for t in said["top"]))
            seen += 1
    assert seen > 200 and worst < 1e-4
