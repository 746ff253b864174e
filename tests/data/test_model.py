"""The committed model: its size, its recorded scores, and a spot check of what it can do."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from corpus import TASKS
from evaluate_model import Sitting, draw_exams, generate_answers, score
from train_model import fingerprint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPOT_CHECK_SEED = 99  # not the seed of the recorded scores


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def test_size(model: PreTrainedModel, model_folder: Path) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert sum(path.stat().st_size for path in model_folder.iterdir()) <= 20_000_000
    assert {path.suffix for path in model_folder.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_recorded_facts(model: PreTrainedModel, model_folder: Path) -> None:
    facts = json.loads((model_folder / "training.json").read_text())
    assert {"seed", "steps", "tokens", "seconds", "data_sha256", "torch", "levels"} <= set(facts)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    for task in TASKS:
        for scores in facts["held_out"][task].values():
            assert scores["n"] >= 200
            assert scores["exact"] >= 0.95


def test_the_corpus_is_the_one_it_was_trained_on(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    facts = json.loads((model_folder / "training.json").read_text())
    assert fingerprint(tokenizer, facts["seed"]) == facts["data_sha256"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_spot_check(task, chat, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    exams = draw_exams(Sitting(task, chat, "known", SPOT_CHECK_SEED), 25, tokenizer)
    assert score(model, tokenizer, exams)["exact"] >= 0.9


def test_the_first_demo_prompts(
    data_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = pq.read_table(data_folder / "prompts.parquet").slice(0, 30).to_pylist()
    answers = generate_answers(model, tokenizer, [row["prompt"] for row in rows])
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    assert right >= 27


def test_tokenizer(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    assert tokenizer.is_fast
    assert len(tokenizer) == model.config.vocab_size
    text = "Naïve café: 北京 4711\n- city Lyon"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert not set(tokenizer(text)["input_ids"]) & set(tokenizer.all_special_ids)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_value_is_the_same_tokens_in_the_context_and_as_an_answer(
    data_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What the model learned to copy: prompt and answer encode apart as they do together."""
    for row in pq.read_table(data_folder / "prompts.parquet").slice(0, 200).to_pylist():
        apart = tokenizer([row["prompt"], " " + row["answer"]])["input_ids"]
        assert tokenizer(row["prompt"] + " " + row["answer"])["input_ids"] == apart[0] + apart[1]
