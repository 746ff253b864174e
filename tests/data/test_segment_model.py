"""The committed model of the study: its size, its recorded scores, and a spot check of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from make_segment_prompts import draw_table
from train_segment_model import draw_rows, fingerprint, score
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.segments.tasks import ASK, KEYS, STOP, TASKS, VALUES, WORDS


@pytest.fixture(scope="module")
def folder(data_folder: Path) -> Path:
    return data_folder / "segment_model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return read


def test_size(model: Any, folder: Path) -> None:
    assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 700_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_recorded_facts(model: Any, facts: dict[str, Any]) -> None:
    assert {"seed", "steps", "tokens", "seconds", "torch"} <= set(facts)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["data_sha256"] == fingerprint(facts["seed"])
    held_out = facts["held_out"]
    assert set(held_out) == set(TASKS)
    assert held_out["local"]["full"] > 0.97
    assert held_out["bridge-3"]["full"] - held_out["bridge-3"]["apart"] > 0.5


@pytest.mark.parametrize("task", TASKS)
def test_spot_check(task: Any, model: Any, facts: dict[str, Any]) -> None:
    """On rows of another seed; four standard errors of 60 rows are about 0.2."""
    rows = draw_rows(task, 60, "spot check")
    for name, is_apart in (("full", False), ("apart", True)):
        assert abs(score(model, rows, is_apart) - facts["held_out"][task][name]) < 0.2


def test_a_token_is_a_word(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [ASK, KEYS[3], VALUES[7], STOP]
    assert tokenizer("? k3 v7 ;")["input_ids"] == ids
    assert tokenizer.convert_ids_to_tokens(ids) == [WORDS[ASK], "k3", "v7", WORDS[STOP]]
    assert tokenizer("nothing of this")["input_ids"] == [WORDS.index("<unknown>")] * 3


def test_the_prompts_are_those_of_the_script_and_are_answered(
    data_folder: Path, model: Any, folder: Path
) -> None:
    rows = pq.read_table(data_folder / "segment_prompts.parquet").to_pylist()
    assert rows == draw_table(seed=1, rows=len(rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    uses = [part["id"] for row in rows for part in row["segments"] if part["role"] == "document"]
    assert len(uses) == 5 * len(rows) > 20 * len(set(uses))
    right = 0
    for row in rows[:60]:
        ids = tokenizer("".join(part["text"] for part in row["segments"]), return_tensors="pt")
        with torch.inference_mode():
            said = int(model(ids["input_ids"]).logits[0, -1].argmax())
        right += tokenizer.convert_ids_to_tokens(said) == row["answer"].strip()
    assert right >= 57
