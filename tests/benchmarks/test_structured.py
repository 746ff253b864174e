"""The benchmark of schemas counts what it says, on the model of the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from benchmarks import launcher, scratch, structured, structured_arms
from benchmarks.setup import Setup
from benchmarks.structured_tasks import SCHEMAS, TASKS
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine

NEW_TOKENS = 60


@pytest.fixture(scope="module")
def setup() -> Setup:
    none = Path("/nowhere")
    return structured.DemoSetup("demo", "float32", NEW_TOKENS, 1, 60.0, none, none)


@pytest.fixture(scope="module")
def engine(setup: Setup) -> Engine:
    return make_engine(structured.settings_of(setup, 8, "prefix"))


def test_the_schemas_are_ten_and_are_schemas() -> None:
    assert len(SCHEMAS) == 10
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_every_answer_is_counted_and_forced_tokens_save_steps(setup: Setup, engine: Engine) -> None:
    classification = TASKS[0]
    with structured.planned_twice(classification, 12, setup, 8) as (ours, plain):
        found, answers = structured.measure(ours, plain, engine, 1)
    assert found["rows"] == found["fit"] + found["cut"] == 12
    assert found["steps_a_row"] < 0.5 * found["tokens_a_row"]
    assert found["fewer_steps"] == pytest.approx(1 - found["steps_a_row"] / found["tokens_a_row"])
    assert classification.name in structured.table({classification.name: found})
    assert len(answers.texts) == 12 and sum(answers.are_cut) == found["cut"]


def test_all_answers_fit_or_say_that_they_were_cut(setup: Setup) -> None:
    said = structured.check_fit(setup, 20, 8)
    counts = [int(number) for number in re.findall(r"(\d+) (?:parse|say length|do neither)", said)]
    assert said.startswith("20 rows over 10 schemas in ")
    assert counts[0] + counts[1] == 20 and counts[2] == 0


def test_what_a_peer_says_is_compared_by_what_it_means(setup: Setup) -> None:
    """Its tokens end with an end of text, and it may spell the same otherwise."""
    with structured.planned_twice(TASKS[0], 4, setup, 8) as (_, plain):
        tokenizer = plain.job.tokenizer
        texts = ['{"label":"positive"}', '{"topic":"arts"}',
                 '{"is_urgent":true,"department":"sales"}', '{"language":"en"}']  # fmt: skip
        ours = structured_arms.Answers(texts, [False] * 3 + [True], 2.0)
        said = ['{"label": "positive"}', '{"topic":"science"}', '{"is_urgent":', texts[3]]
        reasons = ["stop", "stop", "length", "stop"]
        ids = [tokenizer.encode_word(text) for text in said]
        theirs: dict[str, Any] = {"engine": "vllm 0", "seconds": 5.0, "computed": 3,
                  "answers": [*zip(ids, reasons, strict=True)]}  # fmt: skip
        found = structured_arms.beside(plain, ours, theirs)
        wrong = theirs | {"answers": [(ids[1], "stop"), *theirs["answers"][1:]]}
        with pytest.raises(AssertionError, match="science"):
            structured_arms.beside(plain, ours, wrong)
    assert (found["fit"], found["cut"], found["ratio"]) == (3, 1, 2.5)
    assert (found["same"], found["both_whole"]) == (1, 2)
    shown = structured_arms.table({"classification": {"vllm": found, "other": {"failure": "no"}}})
    assert "| 1 of 2 | 2.50 |" in shown and "| classification | other: no |" in shown


def test_vllm_is_sent_the_whole_prompts_and_the_schema_of_each_row(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, sent = tmp_path / "python", tmp_path / "sent"
    python.write_text(f'#!/bin/sh\ncp "$2" {sent}\necho \'{{"answers": []}}\' > "$3"\n')
    python.chmod(0o755)
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))
    monkeypatch.setattr(launcher, "python_of", lambda name: python)
    monkeypatch.setattr("benchmarks.arms.python_of", lambda name: python)
    with structured.planned_twice(TASKS[0], 5, setup, 8) as (_, plain):
        found = structured_arms.ask_vllm("vllm_all_cores", setup, plain, 1)
        prompts = [plain.plan.table[row].tolist() for row in range(5)]
    assert found == {"answers": []}
    job: Any = json.loads(sent.read_text())
    assert job["prompts"] == prompts and job["new_tokens"] == NEW_TOKENS
    names = list(TASKS[0].schemas)
    assert job["schemas"] == [TASKS[0].schemas[names[i % 4]] for i in range(5)]
