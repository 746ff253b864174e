"""First turns of conversations from the KV store, with the engine that carries the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_prompts

SYSTEM = "you are a helpful clerk and answer: "


def test_first_turns_are_loaded_and_answers_stay_the_same(
    kernels: None, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no rates: loading always pays
    texts = [f"{SYSTEM}{n}" for n in range(3)] + [f"and {n}?" for n in range(6)]
    source = write_prompts(
        tmp_path / "in.parquet", texts, conversation_id=[n % 3 for n in range(9)],
        turn=[n // 3 for n in range(9)],
    )  # fmt: skip
    flat = {"model": str(model_folder), "device": "cpu", "max_new_tokens": 6, "threads": 1}
    flat |= {"turn_column": "turn", "kv_store": str(tmp_path / "store"), "ignore_eos": True}
    found = []
    for night in range(2):
        outcome = run_job(str(source), tmp_path / f"out{night}", JobSettings.from_flat(flat))
        found.append((outcome.counters, answers(tmp_path / f"out{night}")))
    (cold, first), (warm, second) = found
    assert first["status"].to_list() == ["ok"] * 9
    assert first["generated_text"].to_list() == second["generated_text"].to_list()
    plan = plan_job(str(source), JobSettings.from_flat(flat)).plan
    shared = plan.count_below(np.arange(len(plan.sequences))) > 1
    assert cold["loaded_tokens"] == 0
    assert warm["loaded_tokens"] == plan.tree.edge_lengths[shared].sum() == len(SYSTEM)
    assert warm["prefilled_tokens"] == cold["prefilled_tokens"] - len(SYSTEM)
