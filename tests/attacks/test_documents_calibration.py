"""Calibration of rows that ask for more than the likeliest token, against both whole jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.job.test_calibration import DOCUMENTS, calibration, model, settings
from tests.tiny_job import answers, on, write_prompts

__all__ = ["model"]
ROWS = 8
REGEX = '{"structured_outputs": {"regex": "[a-c]{2,4}e"}}'
CHOICE = '{"structured_outputs": {"choice": ["yes", "no", "perhaps"]}}'
SCHEMA = '{"type": "boolean"}'


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make_engine(settings(model))


def write_table(path: Path, **columns: list[Any]) -> Path:
    """Rows of two documents in all orders."""
    pairs = [(a, b) for a in DOCUMENTS for b in DOCUMENTS if a != b][:ROWS]
    questions = [f"what {number}?" for number in range(ROWS)]
    return write_prompts(path, questions, documents=[list(pair) for pair in pairs], **columns)


@pytest.mark.fault(
    "prompts in segments",
    injected="calibration of rows held to a schema, an expression or a choice, with penalties, "
    "biases, tokens allowed or banned, stop strings and least lengths",
    outcome="as many rows are said to agree as answers of the two whole jobs are equal",
)
@pytest.mark.parametrize(
    "asked",
    [
        {"sampling_params": REGEX},
        {"sampling_params": CHOICE},
        {"guided_json": SCHEMA},
        {"frequency_penalty": 0.8, "repetition_penalty": 1.4},
        {"logit_bias": '{"5": 4.0}'},
        {"allowed_token_ids": [3, 4, 5, 6]},
        {"stop": ["e", "o"]},
        {"min_tokens": 6, "logprobs": 2},
    ],
    ids=lambda asked: ", ".join(asked) + str(asked.get("sampling_params", ""))[25:32],
)
def test_agreement_is_the_share_of_equal_answers(
    tmp_path: Path, model: Path, engine: Engine, asked: dict[str, Any]
) -> None:
    """Seen red: answers of a form ended with IndexError."""
    columns = {name: [value] * ROWS for name, value in asked.items()}
    source = write_table(tmp_path / "in.parquet", **columns)

    def run(**flat: Any) -> list[list[int]]:
        out = tmp_path / str(flat["reuse"])
        job: JobSettings = settings(model, on_disagreement="warn", **flat)
        run_job(str(source), out, job, make_engine=on(engine))
        found = answers(out)
        assert found["status"].to_list() == ["ok"] * ROWS, found["error_message"].to_list()
        said: list[list[int]] = found["completion_token_ids"].to_list()
        return said

    exact = run(reuse="prefix", documents_column="documents")
    moved = run(reuse="concat")
    equal = sum(one == other for one, other in zip(exact, moved, strict=True))
    found = calibration(tmp_path / "concat")["agreement"]
    assert (found["rows"], found["same"]) == (ROWS, equal)
    assert json.loads((tmp_path / "concat" / "run.json").read_bytes())["status"] == "complete"
