"""The committed model of the study of conversations: its size, its scores, a spot check of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from make_conversation_prompts import draw_table
from train_segment_model import TrainSettings
from train_stateful_model import (
    Training,
    draw_batch,
    draw_streams,
    fingerprint,
    score,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.stateful.streams import ASK, KEYS, STOP, VALUES, WINDOW, WORDS


@pytest.fixture(scope="module")
def folder(data_folder: Path) -> Path:
    return data_folder / "stateful_model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return read


def test_size(model: Any, folder: Path) -> None:
    assert 400_000 <= sum(p.numel() for p in model.parameters()) <= 600_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1_200_000
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}
    assert model.config.max_position_embeddings == WINDOW


def test_recorded_facts(model: Any, facts: dict[str, Any]) -> None:
    assert {"seed", "steps", "tokens", "seconds", "torch"} <= set(facts)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["data_sha256"] == fingerprint(facts["seed"])
    assert set(facts["held_out"]["within"]) == {"0", "64", "128", "192"}
    assert min(facts["held_out"]["within"].values()) > 0.98


def test_it_finds_facts_of_all_ages_within_its_window_and_fewer_beyond(model: Any) -> None:
    """On streams of another seed than those of training.json."""
    found = score(model, draw_streams(40, "spot check", 4 * WINDOW))
    within = [(age, right) for end, age, right in found if end < WINDOW]
    beyond = [right for end, age, right in found if end >= WINDOW and age >= WINDOW]
    assert max(age for age, _ in within) > 0.8 * WINDOW
    assert sum(right for _, right in within) >= 0.97 * len(within)
    assert 0.2 < sum(beyond) / len(beyond) < 0.8


def test_a_token_is_a_word(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [ASK, KEYS[3], VALUES[7], STOP]
    assert tokenizer("? k3 v7 ;")["input_ids"] == ids
    assert tokenizer.convert_ids_to_tokens(ids) == [WORDS[ASK], "k3", "v7", WORDS[STOP]]


def test_a_training_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(seed=1, layers=2, steps=4, batch_tokens=256, learning_rate=1e-3)
    monkeypatch.setattr("train_stateful_model.SAVE_STEPS", 2)
    whole = Training(settings, tmp_path / "whole")
    losses = list(whole.run())
    killed = Training(settings, tmp_path / "killed")
    for _ in range(3):  # one step behind its checkpoint
        next(iter(killed.run()))
    resumed = Training(settings, tmp_path / "killed")
    assert resumed.step == 2 and list(resumed.run()) == losses[2:]
    assert resumed.tokens == whole.tokens
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name
    with pytest.raises(SystemExit, match="other settings"):
        Training(TrainSettings(2, 2, 4, 256, 1e-3), tmp_path / "killed")


@pytest.mark.slow
def test_training_grows_to_the_window_and_writes_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(seed=1, layers=2, steps=2, batch_tokens=512, learning_rate=1e-3)
    assert draw_batch(settings, 0).token_ids.shape[1] <= 96
    assert 200 < draw_batch(settings, 1).token_ids.shape[1] <= WINDOW
    monkeypatch.setattr("train_stateful_model.SAVE_STEPS", 1)
    facts = train(settings, tmp_path / "model")
    assert facts["steps"] == 2 and not (tmp_path / "model.checkpoint").exists()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert made.dtype == torch.bfloat16 and made.config.vocab_size == 288


def test_the_prompts_are_those_of_the_script_and_outgrow_the_window(data_folder: Path) -> None:
    rows = pq.read_table(data_folder / "conversation_prompts.parquet").to_pylist()
    assert rows == draw_table(seed=1, conversations=20)
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "stateful_model")
    lengths: dict[str, int] = {}
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids[-2] == ASK and ids[-1] in KEYS
        name = row["conversation_id"]
        assert row["turn"] == 0 or name in lengths
        lengths[name] = lengths.get(name, 0) + len(ids) + row["max_new_tokens"]
    assert len(lengths) == 20 and min(lengths.values()) >= 3 * WINDOW
    assert tokenizer("".join(row["prompt"] for row in rows[:3]))["input_ids"] == [
        i for row in rows[:3] for i in tokenizer(row["prompt"])["input_ids"]
    ]
